# SPDX-License-Identifier: Apache-2.0
"""Somebody may ask for a job to stop: the work is cancelled then, and ends as one of our errors."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from acestep_consumer.errors import Cancelled

T = TypeVar("T")


async def unless_cancelled(work: Callable[[], Coroutine[Any, Any, T]], asked: Coroutine[Any, Any, None]) -> T:
    """Return what ``work()`` returns. When ``asked`` returns first, cancel it and raise ``Cancelled``.

    Work that cannot be stopped any more ends as it ends. Whoever cancels this call cancels the work, and no less.
    """
    asking = asyncio.create_task(asked, name="cancellation")
    try:
        await asyncio.sleep(0)
        if asking.done():
            asking.result()
            raise Cancelled
        return await _first(asyncio.create_task(work(), name="work"), asking)
    finally:
        asking.cancel()


async def _first(working: "asyncio.Task[T]", asking: "asyncio.Task[None]") -> T:
    try:
        await asyncio.wait((working, asking), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            asking.result()
            await _end(working)
            if working.cancelled():
                raise Cancelled
        return working.result()
    finally:
        await _end(working)


async def _end(task: "asyncio.Task[Any]") -> None:
    """Cancel a task and wait for its end, whatever that is."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # seen, so that nobody complains that nobody looked
