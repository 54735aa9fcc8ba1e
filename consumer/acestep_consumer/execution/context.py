# SPDX-License-Identifier: Apache-2.0
"""One message on its way through the story, and what is known of it so far."""

from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

import structlog

from acestep_consumer.domain.errors import ConsumerError, Interrupted
from acestep_consumer.domain.job import Attempt, Job, Request
from acestep_consumer.domain.outcome import Ending, RunInfo, TerminalRecord, known, unfinished
from acestep_consumer.domain.parse import parse, readable_task_id
from acestep_consumer.domain.ports import Delivery
from acestep_consumer.execution.eta import Estimate
from acestep_schemas.events import Unfinished


@dataclass(slots=True, kw_only=True, eq=False)
class JobContext:
    """What is known of a message.

    Attributes:
        delivery: the message in hand.
        read: what it asks for, or why it cannot be read.
        task_id: whose it is; None when nobody can tell.
        found: how the task ended before, as far as that is written down.
        attempt: which try this is; None before it is known.
        job: what policy made of the request; None before that.
        estimate: what the job will probably take; None before it begins.
        traceparent: the trace that the work belongs to, if any.
    """

    delivery: Delivery
    read: Request | ConsumerError
    task_id: str | None
    found: TerminalRecord | None = None
    attempt: Attempt | None = None
    job: Job | None = None
    estimate: Estimate | None = None
    traceparent: str | None = None

    @classmethod
    def of(cls, delivery: Delivery, max_bytes: int) -> Self:
        """Read a message, of ``max_bytes`` at most."""
        try:
            request = parse(delivery.body, delivery.message_id, max_bytes=max_bytes)
        except ConsumerError as error:
            task_id = readable_task_id(delivery.body, delivery.message_id)
            return cls(delivery=delivery, read=error, task_id=task_id)
        return cls(delivery=delivery, read=request, task_id=request.task_id)

    @property
    def request(self) -> Request:
        """What it asks for. Raises the error that it is instead."""
        if isinstance(self.read, ConsumerError):
            raise self.read
        return self.read

    @property
    def answer(self) -> TerminalRecord | None:
        """How this message ended before, if it did."""
        delivery, found = self.delivery, self.found
        # The time of sending tells one message from the next. Whether it comes again does so only as long as the broker
        # does not crash: a classic queue forgets then what it had delivered.
        same = delivery.redelivered or delivery.sent is not None
        if found is not None and found.answers(delivery.fingerprint, same=same):
            return found
        return None

    @property
    def number(self) -> int:
        """Which try this is, from 1, as far as it is known."""
        return self.attempt.number if self.attempt else 1


log = structlog.get_logger()


class Witness:
    """Speaks for one worker."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id

    def scene(self, case: JobContext) -> RunInfo:
        """Return who works on the message, on which try, now."""
        return RunInfo(self._worker_id, case.number, datetime.now(UTC))

    async def end_of(self, work: Awaitable[Ending], case: JobContext, task_id: str) -> Ending:
        """Return what ``work`` returns, or what its error says. Interruption and cancellation pass: no end yet."""
        try:
            return await work
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - whatever broke, the producer hears of it
            return self.without_songs(error, case, task_id)

    def without_songs(self, error: Exception, case: JobContext, task_id: str) -> Unfinished:
        """Return how the task ended because of ``error``, which is logged: the text of a bug is for the log alone."""
        ours = known(error)
        if type(ours) is ConsumerError:
            log.error("job broke on a bug", exc_info=error)
        else:
            log.warning("job not done", code=str(ours.code), reason=str(ours))
        return unfinished(ours, case.job, task_id, self.scene(case))
