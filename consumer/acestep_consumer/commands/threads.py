# SPDX-License-Identifier: Apache-2.0
"""Runs blocking calls in threads that do not delay the end of the program.

asyncio joins the threads of its own executor at exit, so a file system or driver that hangs would hold the program up.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


async def run_in_thread(call: Callable[[], T]) -> T:
    """Run ``call`` in a daemon thread; returns its result or raises its error. On cancellation the thread runs on."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - raised in the coroutine that waits
            _hand_over(loop, partial(_fail, future, error))
        else:
            _hand_over(loop, partial(_finish, future, result))

    Thread(target=run, name="run_in_thread", daemon=True).start()
    return await future


def _hand_over(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed, nothing waits for the result
        loop.call_soon_threadsafe(call)


def _finish(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[T]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
