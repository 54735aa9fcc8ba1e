# SPDX-License-Identifier: Apache-2.0
"""Context of one delivery: the parsed request, the task's earlier record, its attempt and its job."""

import hashlib
from dataclasses import dataclass
from typing import Self

from acestep_consumer.domain.errors import ConsumerError
from acestep_consumer.domain.job import Attempt, Job, Request
from acestep_consumer.domain.outcome import Ending, TerminalRecord
from acestep_consumer.domain.parse import RequestRules, parse, readable_task_id
from acestep_consumer.domain.ports import Delivery
from acestep_consumer.execution.eta import Estimate
from acestep_consumer.execution.progress import ProgressReporter


@dataclass(slots=True, kw_only=True, eq=False)
class JobContext:
    """State of one delivery while it is processed; filled in stage by stage.

    Attributes:
        delivery: the AMQP delivery.
        parsed: the request, or the error that makes it unreadable.
        task_id: None when neither the body nor the properties have one that can be read.
        found: the task's terminal record in storage, if there is one.
        attempt: None before it is counted.
        excused: whether a record says that the attempt ended through no fault of the message.
        job: the admitted job; None before admission.
        estimate: expected duration; None before admission.
        traceparent: the trace that the job belongs to, if any.
        repeated: whether the task ended otherwise, before or meanwhile, so that only that event is published again.
        warnings: of the processing itself, for the manifest.
        progress: publishes ``started`` and ``progress``; None before admission.
    """

    delivery: Delivery
    parsed: Request | ConsumerError
    task_id: str | None
    found: TerminalRecord | None = None
    attempt: Attempt | None = None
    excused: bool = False
    job: Job | None = None
    estimate: Estimate | None = None
    traceparent: str | None = None
    repeated: bool = False
    warnings: tuple[str, ...] = ()
    progress: ProgressReporter | None = None

    @classmethod
    def of(cls, delivery: Delivery, rules: RequestRules) -> Self:
        """Parse a delivery by the operator's rules."""
        body, message_id, written = delivery.body, delivery.message_id, delivery.body_format
        try:
            request = parse(body, message_id, rules, written)
        except ConsumerError as error:
            task_id = readable_task_id(body, message_id, written)
            return cls(delivery=delivery, parsed=error, task_id=task_id)
        return cls(delivery=delivery, parsed=request, task_id=request.task_id)

    @property
    def request(self) -> Request:
        """The request. Raises the error that makes it unreadable."""
        if isinstance(self.parsed, ConsumerError):
            raise self.parsed
        return self.parsed

    @property
    def answer(self) -> TerminalRecord | None:
        """The earlier record, if it is the end of this very message."""
        delivery, found = self.delivery, self.found
        # The timestamp distinguishes two messages with equal bodies. The redelivered flag would, too, but a classic
        # queue loses it when the broker crashes.
        same = delivery.redelivered or delivery.sent is not None
        if found is not None and found.answers(delivery.fingerprint, same=same):
            return found
        return None

    @property
    def attempt_number(self) -> int:
        """From 1; 1 as long as it is not counted."""
        return self.attempt.number if self.attempt else 1

    @property
    def body_hash(self) -> str:
        """SHA-256 of the body, hexadecimal."""
        return hashlib.sha256(self.delivery.body).hexdigest()

    def record(self, ending: Ending) -> TerminalRecord:
        """Return the record that says that this message ended so."""
        return TerminalRecord(ending, self.delivery.fingerprint, self.traceparent, self.body_hash)

    def ended(self, ours: TerminalRecord, in_force: TerminalRecord) -> TerminalRecord:
        """Return how this message ended: ``ours``, or the record in force where another one was first.

        Then another worker, or another message with this id, has delivered its songs, and these are not delivered. If
        the audio of those songs is gone and could not be made again, their record is kept, for songs that come from
        them and for the next message, and this message has an end of its own.
        """
        ending = ours if in_force == self.answer else in_force
        self.repeated = ending != ours
        return ending
