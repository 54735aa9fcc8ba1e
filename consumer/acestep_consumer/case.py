# SPDX-License-Identifier: Apache-2.0
"""One message on its way through the story, and what is known of it so far."""

from dataclasses import dataclass
from typing import Self

from acestep_consumer.attempt import Attempt
from acestep_consumer.ending import Kept
from acestep_consumer.errors import ConsumerError
from acestep_consumer.eta import Estimate
from acestep_consumer.job import Job, Request
from acestep_consumer.ports import Delivery
from acestep_consumer.validate import parse, readable_task_id


@dataclass(slots=True, kw_only=True, eq=False)
class Case:
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
    found: Kept | None = None
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
    def answer(self) -> Kept | None:
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
