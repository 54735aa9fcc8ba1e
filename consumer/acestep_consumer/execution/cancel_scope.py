# SPDX-License-Identifier: Apache-2.0
"""Cancellation and deadlines of a job: each stops the work and raises one of our errors."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from acestep_consumer.domain.errors import Cancelled, ExecutionTimeout, Expired
from acestep_consumer.domain.job import Request
from acestep_consumer.domain.ports import Delivery

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


@asynccontextmanager
async def deadline(seconds: float | None) -> AsyncIterator[None]:
    """Cancel the body after ``seconds`` (None: never) and raise ``ExecutionTimeout``."""
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired():
            raise  # somebody else's timeout, inside the body
        raise ExecutionTimeout(f"the job ran longer than {seconds:g} seconds") from error


def check_queue_deadline(request: Request, delivery: Delivery) -> Request:
    """Return the request, with a warning where its deadline cannot be told. Raises ``Expired``."""
    allowed, waited = request.body.queue_deadline_s, delivery.queued_s
    if allowed is None:
        return request
    if waited is None:
        warning = "queue_deadline_s had no effect: the message has no timestamp"
        return replace(request, warnings=(*request.warnings, warning))
    if waited > allowed:
        raise Expired(f"it waited {waited:.0f} s in the queue; its queue_deadline_s is {allowed:g}")
    return request
