# SPDX-License-Identifier: Apache-2.0
"""Fakes of the ports; the tests in `tests/contract` hold them to the behaviour of the real adapters."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pamqp.commands import Basic

from acestep_consumer.broker.delivery import AlreadySettledError, fingerprint
from acestep_consumer.domain.errors import ConsumerError, Unpublished, Verdict
from acestep_consumer.domain.job import Attempt
from acestep_consumer.domain.ports import BodyFormat, Reply

if TYPE_CHECKING:
    from datetime import datetime

    from acestep_schemas.events import JobEvent


@dataclass
class FakeDelivery:
    """A delivery that records how it was settled. ``stale``: its channel is closed, so it is not settled."""

    body: bytes = b'{"prompt": "jazz"}'
    message_id: str | None = None
    body_format: BodyFormat = field(default_factory=BodyFormat)
    priority: int = 0
    queued_s: float | None = None
    sent: datetime | None = None
    redelivered: bool = False
    expires: bool = False
    traceparent: str | None = None
    reply: Reply = field(default_factory=Reply)
    stale: bool = False
    tier: str | None = None
    visited_tiers: tuple[str, ...] = ()
    reachable: tuple[str, ...] = ()
    """Tiers that have a worker."""
    forwarded: list[str] = field(default_factory=list)
    identified: bool = False
    verdict: Verdict | None = None
    reason: ConsumerError | None = None
    settled: bool = False

    @property
    def fingerprint(self) -> str:
        """As of a real one."""
        return fingerprint(self.body, Basic.Properties(message_id=self.message_id, timestamp=self.sent))

    async def identify(self) -> None:
        """Remember that a copy with an id was published."""
        self.identified = True

    async def forward(self, tier: str) -> bool:
        """Record the tier that a copy was forwarded to."""
        if tier in self.reachable:
            self.forwarded.append(tier)
        return tier in self.reachable

    async def settle(self, verdict: Verdict, reason: ConsumerError | None = None) -> None:
        """Record the verdict."""
        if self.settled:
            raise AlreadySettledError(f"settled already; not as {verdict}")
        self.settled = True
        if not self.stale:
            self.verdict, self.reason = verdict, reason


@dataclass
class FakeEvents:
    """Records events: ``published`` to the exchange, ``answers`` to reply queues. ``down``: no broker."""

    published: list[tuple[JobEvent, Reply]] = field(default_factory=list)
    answers: list[tuple[str, JobEvent]] = field(default_factory=list)
    down: bool = False

    async def publish(self, event: JobEvent, reply: Reply) -> None:
        """Record the event."""
        if self.down:
            raise Unpublished(f"{event.routing_key}: the fake is down")
        self.published.append((event, reply))
        if event.terminal and reply.reply_to:
            self.answers.append((reply.reply_to, event))

    @property
    def states(self) -> list[str]:
        """The states of the published events, in order."""
        return [str(event.state) for event, _ in self.published]


@dataclass
class FakeAttempts:
    """Remembers tries in memory: ``begun``, ``excused``, ``renewed`` and ``forgotten``, in order.

    ``unexplained`` is what a redelivery finds; ``others`` are the attempts of other workers at each look, the last ones
    from then on.
    """

    unexplained: int = 0
    begun: list[Attempt] = field(default_factory=list)
    excused: list[Attempt] = field(default_factory=list)
    renewed: list[Attempt] = field(default_factory=list)
    others: list[tuple[bytes, ...]] = field(default_factory=list)
    forgotten: list[tuple[str, str]] = field(default_factory=list)

    async def next(self, task_id: str, message: str, *, redelivered: bool) -> Attempt:
        """Return the first try, or the one after those that came to nothing."""
        earlier = self.unexplained if redelivered else 0
        return Attempt(task_id=task_id, message=message, number=earlier + 1, unexplained=earlier)

    async def begin(self, attempt: Attempt, *, expires: bool) -> None:
        """Remember it."""
        self.begun.append(attempt)

    async def renew(self, attempt: Attempt, count: int) -> None:
        """Remember it."""
        self.renewed.append(attempt)

    async def unfinished(self, task_id: str, message: str, *, delivered: bool) -> tuple[bytes, ...]:
        """Return what the next look shows."""
        return self.others.pop(0) if len(self.others) > 1 else (self.others or [()])[0]

    async def excuse(self, attempt: Attempt) -> None:
        """Remember it."""
        self.excused.append(attempt)

    async def forget(self, task_id: str, message: str) -> None:
        """Remember it."""
        self.forgotten.append((task_id, message))


class FakeCancellations:
    """Cancels the tasks in ``asked``; ``ask`` adds one while others wait."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self._news = asyncio.Condition()

    async def ask(self, task_id: str) -> None:
        """Cancel a task."""
        async with self._news:
            self.asked.add(task_id)
            self._news.notify_all()

    async def wait(self, task_id: str, sent: datetime | None) -> None:
        """Wait until somebody asks."""
        async with self._news:
            await self._news.wait_for(lambda: task_id in self.asked)
