# SPDX-License-Identifier: Apache-2.0
"""Runs blocking calls in threads that do not delay the end of the program.

asyncio joins the threads of its own executor at exit, so a file system or driver that hangs would hold the program up.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


async def run_in_thread(call: Callable[[], T]) -> T:
    """Run ``call`` in a daemon thread; returns its result or raises its error. On cancellation the thread runs on."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from here on a cancellation ends the wait alone

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised in the coroutine that waits
            future.set_exception(error)

    Thread(target=run, name="run_in_thread", daemon=True).start()
    return await asyncio.wrap_future(future)
