# SPDX-License-Identifier: Apache-2.0
"""A delivery: one message, settled exactly once, on the channel that delivered it or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog
from pamqp.commands import Basic

from acestep_consumer.broker.dead_letter import (
    RETURNED,
    TIERS,
    format_of,
    forwarded_properties,
    sent_expiration,
    visited_tiers,
)
from acestep_consumer.broker.errors import BrokerError, describe, mapped
from acestep_consumer.broker.topology import MAX_PRIORITY, tier_of
from acestep_consumer.domain.errors import ConsumerError, Verdict
from acestep_consumer.domain.ports import BodyFormat, Reply

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel, DeliveredMessage

    from acestep_consumer.broker.publisher import Publisher

# A socket that accepts no data for so long is as good as closed; settling must not wait for its heartbeat to fail.
SETTLE_TIMEOUT_S = 10.0

_TRACEPARENT = re.compile("00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

log = structlog.get_logger()


Identify = Callable[[bytes, Basic.Properties, "AbstractChannel"], Awaitable[None]]
"""Publishes the copy of a message that has a message id now, while the original's channel is open. Raises
``Unpublished``."""


class AlreadySettledError(RuntimeError):
    """A delivery was settled a second time: a bug. The broker would close the channel over it."""


def fingerprint(body: bytes, properties: Basic.Properties) -> str:
    """Return a hash of the parts that the producer wrote: 32 hexadecimal digits.

    A copy of a message within the same second differs in its other properties, if in anything: one that expires must
    not end one that does not.
    """
    digest, sent = hashlib.blake2b(body, digest_size=16), properties.timestamp
    digest.update(repr((properties.message_id or None, sent and sent.timestamp())).encode())
    others = properties.priority, sent_expiration(properties), properties.reply_to, properties.correlation_id
    if any(others):  # without them, as earlier versions did it
        digest.update(repr(tuple(value or None for value in others)).encode())
    return digest.hexdigest()


class AmqpDelivery:
    """A message of the queue, which its holder has to settle. Implements ``domain.ports.Delivery``."""

    def __init__(self, message: DeliveredMessage, publisher: Publisher, identify: Identify) -> None:
        self._message = message
        self._publisher = publisher
        self._identify = identify
        self._properties = message.header.properties
        self._received = time.time()
        self._settled = False
        self._handed_on = False

    @property
    def body(self) -> bytes:
        """The message's bytes as they came."""
        return self._message.body

    @property
    def message_id(self) -> str | None:
        """AMQP ``message_id``."""
        return self._properties.message_id or None

    @property
    def body_format(self) -> BodyFormat:
        """AMQP ``content_type`` and ``content_encoding``."""
        return format_of(self._properties)

    @property
    def priority(self) -> int:
        """AMQP ``priority``, 0 to 9 as the queue has them; 0 without one."""
        return min(self._properties.priority or 0, MAX_PRIORITY)

    @property
    def headers(self) -> dict[str, Any]:
        """AMQP headers; empty when there are none."""
        return self._properties.headers or {}

    @property
    def queued_s(self) -> float | None:
        """Seconds from the producer's ``timestamp`` to the arrival at this worker; None without one.

        The timestamp has whole seconds of another machine's clock: a difference below zero counts as zero.
        """
        return None if self.sent is None else max(0.0, self._received - self.sent.timestamp())

    @property
    def sent(self) -> datetime | None:
        """The producer's ``timestamp``, in UTC; None without one."""
        return self._properties.timestamp

    @property
    def redelivered(self) -> bool:
        """Whether the message was delivered before and not settled."""
        counts = (self.headers.get(name) for name in ("x-delivery-count", "x-acquired-count"))
        again = any(isinstance(count, int) and count > 0 for count in counts)
        return bool(self._message.redelivered) or RETURNED in self.headers or again

    @property
    def expires(self) -> bool:
        """Whether it has an expiration, which counts on while a worker has it."""
        return bool(self._properties.expiration)

    @cached_property
    def fingerprint(self) -> str:
        """A hash that is the same for each delivery of this message, and differs when it is published again."""
        return fingerprint(self.body, self._properties)

    @property
    def traceparent(self) -> str | None:
        """The header of that name (W3C Trace Context); None without a valid one."""
        header = self.headers.get("traceparent")
        return header if isinstance(header, str) and _TRACEPARENT.fullmatch(header) else None

    @property
    def reply(self) -> Reply:
        """The AMQP properties that the job's events echo."""
        return Reply(self._properties.reply_to or None, self._properties.correlation_id or None)

    @property
    def tier(self) -> str | None:
        """The tier whose queue it was forwarded to; None: it comes from the producers' queue."""
        return tier_of(self._message.routing_key or "") if not self._message.exchange else None

    @property
    def visited_tiers(self) -> tuple[str, ...]:
        """All tiers that it was forwarded to so far."""
        return visited_tiers(self._properties)

    @property
    def settled(self) -> bool:
        """Whether it has been settled, or is being settled."""
        return self._settled

    @property
    def done(self) -> bool:
        """Whether it was settled as the end of its job: neither requeued nor handed on to another queue."""
        return self._settled and not self._handed_on

    @property
    def stale(self) -> bool:
        """Whether its channel is closed: the broker delivers the message again, perhaps to another worker."""
        return self._message.channel.is_closed

    async def forward(self, tier: str) -> bool:
        """Publish a copy to the queue of a tier, confirmed. False: the tier has no worker, or its queue no room.

        Raises:
            Unpublished: it is not known whether the copy arrived.
        """
        copy = forwarded_properties(self._properties, self.queued_s, redelivered=self.redelivered)
        copy.headers = {**(copy.headers or {}), TIERS: ",".join((*self.visited_tiers, tier))}
        if copy.expiration == "0":
            return False  # it would expire there at once, and was delivered in time; its producer's clock may be wrong
        self._handed_on = await self._publisher.forward(self.body, copy, tier)
        return self._handed_on

    async def identify(self) -> None:
        """Publish a copy with a message id, confirmed, to the queue that is consumed first.

        The copy has the producer's properties, its priority and what is left of its expiration among them.

        Raises:
            Unpublished: the confirm is missing; a copy may be there.
        """
        copy = forwarded_properties(self._properties, self.queued_s, redelivered=False)
        copy.message_id = str(uuid4())
        if copy.expiration == "0":
            copy.expiration = None  # it was delivered in time; its producer's clock may be wrong
        await self._identify(self.body, copy, self._message.channel)
        self._handed_on = True

    async def settle(self, verdict: Verdict, reason: ConsumerError | None = None) -> None:
        """Ack, requeue, or move to the dead-letter exchange with the reason. Does nothing for a stale delivery.

        Raises:
            Unpublished: the dead letter was not confirmed; the delivery is not settled then.
            AlreadySettledError: it was settled before.
        """
        if self._settled:
            raise AlreadySettledError(
                f"delivery {self._message.delivery_tag} is settled already, so it cannot be settled as {verdict}"
            )
        self._handed_on = self._handed_on or verdict is Verdict.REQUEUE
        if self.stale:
            self._skip(verdict, "its channel is closed")
            return
        self._settled = True
        if verdict is Verdict.DEAD_LETTER:
            await self._dead_letter(reason)
        try:
            with mapped():
                async with asyncio.timeout(SETTLE_TIMEOUT_S):
                    await self._send(verdict)
        except BrokerError as fault:
            self._skip(verdict, describe(fault))

    async def _dead_letter(self, reason: ConsumerError | None) -> None:
        try:
            await self._publisher.dead_letter(self.body, self._properties, reason)
        except BaseException:
            self._settled = False
            raise

    async def _send(self, verdict: Verdict) -> None:
        channel, tag = self._message.channel, self._message.delivery_tag
        if tag is None:
            raise AlreadySettledError("the message was not delivered to a consumer")
        # Both wait until the frame is sent: closing the connection drops frames that aiormq still has queued.
        if verdict is Verdict.REQUEUE:
            await channel.basic_nack(tag, requeue=True)
        else:
            await channel.basic_ack(tag)

    def _skip(self, verdict: Verdict, why: str) -> None:
        self._settled = True
        log.info("stale delivery not settled; it will be redelivered", verdict=str(verdict), reason=why)
