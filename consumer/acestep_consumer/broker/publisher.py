# SPDX-License-Identifier: Apache-2.0
"""Publishes events, dead letters and forwarded requests; each publish is confirmed by the broker, or raises."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog
from pamqp.commands import Basic

from acestep_consumer.broker.backoff import backoff
from acestep_consumer.broker.dead_letter import dead_letter_properties
from acestep_consumer.broker.errors import (
    BrokerError,
    BrokerRefused,
    ConnectionLost,
    Nacked,
    Unroutable,
    describe,
    mapped,
)
from acestep_consumer.broker.topology import CONTROL, DEAD_LETTER, EVENTS, IDENTIFIED, TIER, tier_queue
from acestep_consumer.domain.errors import ConsumerError, Unpublished
from acestep_schemas.events import CONTENT_TYPE, JobEvent, JobProgress, JobStarted, WorkerEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiormq.abc import AbstractChannel
    from aiormq.channel import Channel

    from acestep_consumer.broker.connection import BrokerConnection
    from acestep_consumer.domain.ports import Reply

APP_ID = "acestep-consumer"
SYSTEM_PREFIX, CLIENT_PREFIX = "acestep.", "acestep.client."
TRANSIENT, PERSISTENT = 1, 2

PATIENCE_S = 60.0
# Progress may be lost and must not be late; a worker that stops must not wait for an unreachable broker.
SHORT_PATIENCE_S = 5.0
FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 5.0
# RabbitMQ closes the connection over a malformed direct reply-to, and the producer chooses the text. Two tries, so that
# a reply outlives one lost connection; no more, so that such a text cannot close the connection again and again.
REPLY_TRIES = 2
FORWARD_TRIES = 3
TIER_RECONNECT_INTERVAL_S = 600.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Outgoing:
    exchange: str
    routing_key: str
    body: bytes
    properties: Basic.Properties
    may_be_refused: bool = False
    """Whether a refusal is an expected answer and no fault."""


class Publisher:
    """Publishes on ``connection``, as many messages at a time as callers wait: each awaits its own confirm.

    A publish is retried on the next connection until its time is over. A lost confirm therefore means a second copy:
    subscribers recognise it by the event's id.
    """

    def __init__(
        self, connection: BrokerConnection, worker_id: str, on_fault: Callable[[BrokerError], None] = lambda _: None
    ) -> None:
        """``on_fault`` is called with the error of each failed try."""
        self._connection = connection
        self._on_fault = on_fault
        self._worker_id = worker_id
        # Returned messages are matched by message_id, and producers choose the ids of their messages: so of those only
        # one is published at a time.
        self._producer_message = asyncio.Lock()

    async def publish(self, event: JobEvent, reply: Reply) -> None:
        """Publish to the events exchange; a terminal event then goes to ``reply.reply_to`` as well.

        A progress event gets 5 seconds, all others get 60.

        Raises:
            Unpublished: the broker did not confirm in time.
        """
        body = event.to_json()
        properties = _event_properties(event, event.id, reply.correlation_id)
        patience_s = SHORT_PATIENCE_S if isinstance(event, JobProgress) else PATIENCE_S
        await self._publish_until_confirmed(_Outgoing(EVENTS, event.routing_key, body, properties), patience_s)
        if event.terminal and reply.reply_to:
            await self._reply(event, body, reply.reply_to, reply.correlation_id)

    async def announce(self, event: WorkerEvent) -> None:
        """Publish a worker's event. Raises ``Unpublished`` after 5 seconds."""
        message = _Outgoing(EVENTS, event.routing_key, event.to_json(), _event_properties(event, event.id, None))
        await self._publish_until_confirmed(message, SHORT_PATIENCE_S)

    async def dead_letter(self, body: bytes, properties: Basic.Properties, reason: ConsumerError | None) -> None:
        """Publish a message to the dead-letter exchange: its bytes and headers as they came, and the reason.

        Raises:
            Unpublished: the broker did not confirm it within 60 seconds of its turn; one is published at a time.
        """
        annotated = dead_letter_properties(properties, reason, self._worker_id)
        async with self._producer_message:
            # The exchange has another queue as well, so the broker would not return a message that misses this one.
            with suppress(BrokerError):
                await self._connection.ensure_queue(DEAD_LETTER)
            await self._publish_until_confirmed(_Outgoing(DEAD_LETTER, "", body, annotated), PATIENCE_S)

    async def identify(self, body: bytes, properties: Basic.Properties, original: AbstractChannel) -> None:
        """Publish the copy of a request that has a message id now. ``original``: the channel that the request came on.

        Not once that channel is closed: the request is delivered again then and gets another copy, and this one would
        be a second job. Hence no limit for the confirm either, which a broker that is short of memory delays.

        Raises:
            Unpublished: that channel is closed, and a copy may be there; or the copy was refused for 60 seconds.
        """
        message, give_up_at = _Outgoing("", IDENTIFIED, body, properties), time.monotonic() + PATIENCE_S
        for wait in backoff(FIRST_WAIT_S, LONGEST_WAIT_S):
            try:
                channel = await self._connection.channel()
                with mapped():
                    # Changes nothing. A connection that died without a word answers nothing, until a heartbeat is due.
                    await original.flow(active=True)
                return await _publish_on(channel, message)
            except BrokerError as fault:
                self._on_error(message, fault)
                if original.is_closed or (not isinstance(fault, ConnectionLost) and time.monotonic() > give_up_at):
                    raise Unpublished(f"{IDENTIFIED}: {describe(fault)}") from fault
            await asyncio.sleep(wait)
        return None  # not reached: there is always another try

    async def forward(self, body: bytes, properties: Basic.Properties, tier: str) -> bool:
        """Publish a request to the queue of a tier. False: the tier has no worker, or its queue is full.

        Raises:
            Unpublished: the broker did not confirm it; a copy may have arrived.
        """
        message = _Outgoing("", tier_queue(tier), body, properties, may_be_refused=True)
        try:
            if not await self.notify_tier(tier):
                return False
            async with self._producer_message:
                await self._publish_until_confirmed(message, PATIENCE_S, tries=FORWARD_TRIES)
        except (Nacked, Unroutable, BrokerRefused) as fault:
            log.info("not forwarded", tier=tier, reason=describe(fault))
            return False
        except BrokerError as fault:
            raise Unpublished(f"{message.routing_key}: {describe(fault)}") from fault
        # Makes a worker take it at once; without it, the worker's next look at the queue finds it.
        with suppress(Unpublished, BrokerRefused):
            await self.notify_tier(tier)
        return True

    async def notify_tier(self, tier: str) -> bool:
        """Make the workers of a tier look at its queue. Returns whether there are any.

        Raises:
            Unpublished: the broker did not answer.
            BrokerRefused: this user may not publish that.
        """
        properties = Basic.Properties(message_id=uuid4().hex)
        try:
            notification = _Outgoing(CONTROL, f"{TIER}.{tier}", b"", properties, may_be_refused=True)
            await self._publish_until_confirmed(notification, SHORT_PATIENCE_S, tries=2)
        except Unroutable:
            return False
        except BrokerRefused:
            raise
        except BrokerError as fault:
            raise Unpublished(f"{TIER}.{tier}: {describe(fault)}") from fault
        return True

    async def _reply(self, event: JobEvent, body: bytes, reply_to: str, correlation_id: str | None) -> None:
        """Publish a terminal event to the request's ``reply_to``. A failure is logged and does not affect the job.

        The producer chooses the queue, and this worker's login writes to it: so the system's own queues are refused.
        """
        if reply_to.startswith(SYSTEM_PREFIX) and not reply_to.startswith(CLIENT_PREFIX):
            log.warning("reply refused: the queue is the system's own", reply_to=reply_to, event_type=event.type)
            return
        # An id of its own: if the broker returns this copy, the event's publish must not be taken for it.
        properties = _event_properties(event, f"{event.id}.reply", correlation_id)
        # A full queue of a producer's is no fault of this connection: it must not be able to have it dropped.
        message = _Outgoing("", reply_to, body, properties, may_be_refused=True)
        try:
            await self._publish_until_confirmed(message, PATIENCE_S, tries=REPLY_TRIES)
        except BrokerError as fault:
            log.info("reply not delivered", reply_to=reply_to, reason=describe(fault), event_type=event.type)

    async def _publish_until_confirmed(self, message: _Outgoing, patience_s: float, tries: int | None = None) -> None:
        """Publish until confirmed. With ``tries``, retry a lost connection alone, up to so many tries in all.

        Raises:
            Unpublished: ``patience_s`` seconds have passed.
            BrokerError: with ``tries``, the error of the last one.
        """
        fault: BrokerError | None = None
        try:
            async with asyncio.timeout(patience_s):
                for tried, wait in enumerate(backoff(FIRST_WAIT_S, LONGEST_WAIT_S), 1):
                    try:
                        return await self._publish_once(message)
                    except BrokerError as error:
                        self._on_error(message, fault := error)
                    if tries is not None and (tried == tries or not isinstance(fault, ConnectionLost)):
                        raise fault
                    await self._recover(message, fault)
                    await asyncio.sleep(wait)
        except TimeoutError:
            why = "no confirm" if fault is None else describe(fault)
            raise Unpublished(f"{message.routing_key or message.exchange}: {why} in {patience_s:g} s") from fault

    def _on_error(self, message: _Outgoing, fault: BrokerError) -> None:
        if isinstance(fault, Nacked):
            # The queue of a tier may be full for hours, which is no reason to reconnect all the time.
            self._connection.publish_refused(TIER_RECONNECT_INTERVAL_S if message.may_be_refused else None)
        if not (message.may_be_refused and isinstance(fault, Nacked | Unroutable)):
            self._on_fault(fault)

    async def _publish_once(self, message: _Outgoing) -> None:
        await _publish_on(await self._connection.channel(), message)

    async def _recover(self, message: _Outgoing, fault: BrokerError) -> None:
        """Declare the topology again: each of the exchanges has a queue unless somebody deleted it."""
        if message.exchange and isinstance(fault, Unroutable):
            with suppress(BrokerError):
                await self._connection.redeclare()


async def _publish_on(channel: Channel, message: _Outgoing) -> None:
    """Publish once and wait for the confirm. Raises ``BrokerError``."""
    with mapped():
        # wait=False: the next publish need not wait until this one is sent.
        await channel.basic_publish(
            message.body,
            exchange=message.exchange,
            routing_key=message.routing_key,
            properties=message.properties,
            mandatory=True,
            wait=False,
        )


def _event_properties(event: JobEvent | WorkerEvent, message_id: str, correlation_id: str | None) -> Basic.Properties:
    return Basic.Properties(
        content_type=CONTENT_TYPE,
        delivery_mode=_mode_of(event),
        message_id=message_id,
        correlation_id=correlation_id,
        timestamp=event.time,
        message_type=event.type,
        app_id=APP_ID,
    )


def _mode_of(event: JobEvent | WorkerEvent) -> int:
    """Return AMQP's delivery mode: a job's end must survive the broker's restart, its start and progress need not."""
    return TRANSIENT if isinstance(event, JobStarted | JobProgress) else PERSISTENT
