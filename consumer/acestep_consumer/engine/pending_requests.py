# SPDX-License-Identifier: Apache-2.0
"""The orders inside one engine process: who waits for an answer, and who is in there unawaited."""

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
    """Sent and not answered. No clock of its own: whoever calls passes the time, in seconds of any steady clock.

    An order that was stopped stays until the process answers it: until then it is inside, and can bring it down.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, _PendingRequest] = {}
        self._none = asyncio.Event()
        self._none.set()
        self.since_s = 0.0
        """When the first of those that are open came into an empty process."""

    def __len__(self) -> int:
        return len(self._open)

    @property
    def first_stop_s(self) -> float | None:
        """When the one that was stopped first was; None when none of these is stopped."""
        return min((order.stopped_s for order in self._open.values() if order.stopped_s is not None), default=None)

    def add(self, report: Report, now_s: float) -> "tuple[int, asyncio.Future[object]]":
        """Open an order: its number, and the future that gets the answer. An answer may be an exception, as a value."""
        if not self._open:
            self.since_s = now_s
        self._none.clear()
        number = next(self._numbers)
        order = self._open[number] = _PendingRequest(asyncio.get_running_loop().create_future(), report)
        return number, order.answer

    def stop(self, number: int, now_s: float) -> bool:
        """Note that nobody waits any more; tell whether the process has yet to answer."""
        order = self._open.get(number)
        if order is None:
            return False
        order.stopped_s = now_s
        return True

    def report(self, number: int, fraction: float, stage: str) -> None:
        """Pass progress on."""
        if (order := self._open.get(number)) is not None and order.stopped_s is None:
            order.report(fraction, stage)

    def answer(self, number: int, answer: object) -> None:
        """Close an order."""
        order = self._open.pop(number, None)
        if order is not None and not order.answer.done():
            order.answer.set_result(answer)
        if not self._open:
            self._none.set()

    def lose(self, answer: Callable[[], object]) -> None:
        """Close all: the process is gone."""
        for number in list(self._open):
            self.answer(number, answer())

    async def wait_none(self) -> None:
        """Wait until the process has answered all that it was given."""
        await self._none.wait()
