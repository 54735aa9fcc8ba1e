# SPDX-License-Identifier: Apache-2.0
"""Requests inside one engine process: sent and not answered, with the future that each answer goes to."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from acestep_consumer.domain.ports import Report


@dataclass(slots=True)
class _PendingRequest:
    answer: "asyncio.Future[object]"
    report: Report
    stopped_s: float | None = None


class PendingRequests:
    """Requests by id. It has no clock: callers pass the time, in seconds of any monotonic clock.

    A stopped request stays until the process answers it: until then it is inside, and can bring the process down.
    """

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._pending: dict[int, _PendingRequest] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self.since_s = 0.0
        """The time when the process was last given a request while it had none."""

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def first_stop_s(self) -> float | None:
        """The time of the earliest stop among the pending requests; None when none is stopped."""
        stops = (request.stopped_s for request in self._pending.values() if request.stopped_s is not None)
        return min(stops, default=None)

    def add(self, report: Report, now_s: float) -> "tuple[int, asyncio.Future[object]]":
        """Add a request. Returns its id, and the future of its answer, which may be an exception as a value."""
        if not self._pending:
            self.since_s = now_s
        self._empty.clear()
        request_id = next(self._ids)
        request = self._pending[request_id] = _PendingRequest(asyncio.get_running_loop().create_future(), report)
        return request_id, request.answer

    def stop(self, request_id: int, now_s: float) -> bool:
        """Mark a request as stopped: nobody waits for it any more. Returns whether it is still pending."""
        request = self._pending.get(request_id)
        if request is None:
            return False
        request.stopped_s = now_s
        return True

    def report(self, request_id: int, fraction: float, stage: str) -> None:
        """Report progress to the caller, unless the request was stopped."""
        if (request := self._pending.get(request_id)) is not None and request.stopped_s is None:
            request.report(fraction, stage)

    def answer(self, request_id: int, answer: object) -> None:
        """Set a request's answer and remove it."""
        request = self._pending.pop(request_id, None)
        if request is not None and not request.answer.done():
            request.answer.set_result(answer)
        if not self._pending:
            self._empty.set()

    def answer_all(self, answer: Callable[[], object]) -> None:
        """Answer every request, each with a new value: the process is gone."""
        for request_id in list(self._pending):
            self.answer(request_id, answer())

    async def wait_empty(self) -> None:
        """Wait until the process has answered every request."""
        await self._empty.wait()
