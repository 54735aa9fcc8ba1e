# SPDX-License-Identifier: Apache-2.0
"""A blocking call beside the event loop that nobody has to wait for.

The loop's own threads are waited for when the program ends. A file system that hangs, or a driver, would hold it up.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


async def aside(call: Callable[[], T]) -> T:
    """Make ``call`` in a thread and return or raise what comes of it. When cancelled, the thread is left to itself."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the one who waits
            _hand_over(loop, partial(_fail, future, error))
        else:
            _hand_over(loop, partial(_finish, future, result))

    Thread(target=run, name="aside", daemon=True).start()
    return await future


def _hand_over(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(call)


def _finish(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[T]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
