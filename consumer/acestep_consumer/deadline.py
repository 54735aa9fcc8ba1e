# SPDX-License-Identifier: Apache-2.0
"""The two clocks of a job: how long it may wait in the queue, and how long it may run. Both end as errors of ours."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from acestep_consumer.errors import ExecutionTimeout, Expired
from acestep_consumer.job import Request
from acestep_consumer.ports import Delivery


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
