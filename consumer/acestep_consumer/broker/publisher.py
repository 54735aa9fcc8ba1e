# SPDX-License-Identifier: Apache-2.0
"""The way out: every publish is confirmed by the broker, or raises."""

from __future__ import annotations

import asyncio
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
from acestep_consumer.broker.topology import CONTROL, DEAD_LETTER, EVENTS, TIER, tier_queue
from acestep_consumer.domain.errors import ConsumerError, Unpublished
from acestep_schemas.events import CONTENT_TYPE, JobEvent, JobProgress, JobStarted, WorkerEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from acestep_consumer.broker.connection import BrokerConnection
    from acestep_consumer.domain.ports import Reply

APP_ID = "acestep-consumer"
OURS, CLIENTS = "acestep.", "acestep.client."
TRANSIENT, PERSISTENT = 1, 2

PATIENCE_S = 60.0
# Progress may be lost and must not come late; a worker that leaves must not wait for a broker that is gone.
SHORT_PATIENCE_S = 5.0
FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 5.0
# A reply_to is a stranger's text: RabbitMQ ends the connection over a malformed direct reply-to. Twice, so that an
# answer outlives one lost connection, and no more, so that such a text cannot take the link down again and again.
REPLY_TRIES = 2
FORWARD_TRIES = 3
RENEWED_FOR_A_TIER_S = 600.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    exchange: str
    routing_key: str
    body: bytes
    properties: Basic.Properties
    asks: bool = False
    """Whether a refusal is an answer, and no fault."""


class Publisher:
    """Publishes on ``link``, as many at a time as callers wait: confirms are awaited per message, not in turn.

    A publish is tried again on the next connection until its patience ends. A confirm that got lost therefore means a
    second copy: subscribers recognise it by the event's id.
    """

    def __init__(
        self, link: BrokerConnection, worker_id: str, on_fault: Callable[[BrokerError], None] = lambda _: None
    ) -> None:
        """``on_fault`` is told of each try that came to nothing."""
        self._link = link
        self._on_fault = on_fault
        self._worker_id = worker_id
        # Returned messages are matched by message_id, and producers' own messages carry the ids that those chose.
        self._one_of_theirs = asyncio.Lock()

    async def publish(self, event: JobEvent, reply: Reply) -> None:
        """Publish to the events exchange; a terminal event then goes to ``reply.reply_to`` as well.

        A progress event gets 5 seconds, all others get 60.

        Raises:
            Unpublished: the broker did not confirm in time.
        """
        body = event.to_json()
        properties = _event_properties(event, event.id, reply.correlation_id)
        patience_s = SHORT_PATIENCE_S if isinstance(event, JobProgress) else PATIENCE_S
        await self._insist(_Outgoing(EVENTS, event.routing_key, body, properties), patience_s)
        if event.terminal and reply.reply_to:
            await self._answer(event, body, reply.reply_to, reply.correlation_id)

    async def announce(self, event: WorkerEvent) -> None:
        """Publish what the worker itself does. Raises ``Unpublished`` after 5 seconds."""
        message = _Outgoing(EVENTS, event.routing_key, event.to_json(), _event_properties(event, event.id, None))
        await self._insist(message, SHORT_PATIENCE_S)

    async def dead_letter(self, body: bytes, properties: Basic.Properties, reason: ConsumerError | None) -> None:
        """Keep a message that could not be run: its bytes and headers as they came, and why.

        Raises:
            Unpublished: the broker did not confirm it within 60 seconds of its turn; one goes out at a time.
        """
        kept = dead_letter_properties(properties, reason, self._worker_id)
        async with self._one_of_theirs:
            # The exchange has another queue, so that the broker would not return what misses this one.
            with suppress(BrokerError):
                await self._link.ensure(DEAD_LETTER)
            await self._insist(_Outgoing(DEAD_LETTER, "", body, kept), PATIENCE_S)

    async def forward(self, body: bytes, properties: Basic.Properties, tier: str) -> bool:
        """Publish a request to the queue of a tier. False: no worker of that tier is there, or its queue is full.

        Raises:
            Unpublished: the broker did not confirm it; a copy may be there all the same.
        """
        message = _Outgoing("", tier_queue(tier), body, properties, asks=True)
        try:
            if not await self.call(tier):
                return False
            async with self._one_of_theirs:
                await self._insist(message, PATIENCE_S, tries=FORWARD_TRIES)
        except (Nacked, Unroutable, BrokerRefused) as fault:
            _log.info("not sent on", tier=tier, reason=describe(fault))
            return False
        except BrokerError as fault:
            raise Unpublished(f"{message.routing_key}: {describe(fault)}") from fault
        # So that it is taken at once. It is there, whatever becomes of this call: it is found all the same.
        with suppress(Unpublished, BrokerRefused):
            await self.call(tier)
        return True

    async def call(self, tier: str) -> bool:
        """Return whether a worker of that tier hears us.

        Raises:
            Unpublished: the broker did not say.
            BrokerRefused: this user may not ask.
        """
        properties = Basic.Properties(message_id=uuid4().hex)
        try:
            question = _Outgoing(CONTROL, f"{TIER}.{tier}", b"", properties, asks=True)
            await self._insist(question, SHORT_PATIENCE_S, tries=2)
        except Unroutable:
            return False
        except BrokerRefused:
            raise
        except BrokerError as fault:
            raise Unpublished(f"{TIER}.{tier}: {describe(fault)}") from fault
        return True

    async def _answer(self, event: JobEvent, body: bytes, reply_to: str, correlation_id: str | None) -> None:
        """A requester who does not take the answer has the event; the job does not suffer for it.

        The name is a stranger's, the right to write is ours: our own queues are not for answers.
        """
        if reply_to.startswith(OURS) and not reply_to.startswith(CLIENTS):
            _log.warning("reply refused: that queue is not for answers", reply_to=reply_to, event_type=event.type)
            return
        # An id of its own: should the broker return this copy, the event's must not be taken for it.
        properties = _event_properties(event, f"{event.id}.reply", correlation_id)
        message = _Outgoing("", reply_to, body, properties)
        try:
            await self._insist(message, PATIENCE_S, tries=REPLY_TRIES)
        except BrokerError as fault:
            _log.info("reply not taken", reply_to=reply_to, reason=describe(fault), event_type=event.type)

    async def _insist(self, message: _Outgoing, patience_s: float, tries: int | None = None) -> None:
        """Publish until confirmed; with ``tries``, only a lost link is tried again, so often in all.

        Raises:
            Unpublished: ``patience_s`` seconds have passed.
            BrokerFault: with ``tries``, the fault that ended them.
        """
        fault: BrokerError | None = None
        try:
            async with asyncio.timeout(patience_s):
                for tried, wait in enumerate(backoff(FIRST_WAIT_S, LONGEST_WAIT_S), 1):
                    try:
                        return await self._publish_once(message)
                    except BrokerError as error:
                        self._note(message, fault := error)
                    if tries is not None and (tried == tries or not isinstance(fault, ConnectionLost)):
                        raise fault
                    await self._recover(message, fault)
                    await asyncio.sleep(wait)
        except TimeoutError:
            why = "no confirm" if fault is None else describe(fault)
            raise Unpublished(f"{message.routing_key or message.exchange}: {why} in {patience_s:g} s") from fault

    def _note(self, message: _Outgoing, fault: BrokerError) -> None:
        if isinstance(fault, Nacked):
            # The queue of a tier may be full for hours, which is no reason to connect anew all the time.
            self._link.refused(RENEWED_FOR_A_TIER_S if message.asks else None)
        if not (message.asks and isinstance(fault, Nacked | Unroutable)):
            self._on_fault(fault)

    async def _publish_once(self, message: _Outgoing) -> None:
        channel = await self._link.channel()
        with mapped():
            # wait=False: the next publish need not wait until this one has left the socket's buffer.
            await channel.basic_publish(
                message.body,
                exchange=message.exchange,
                routing_key=message.routing_key,
                properties=message.properties,
                mandatory=True,
                wait=False,
            )

    async def _recover(self, message: _Outgoing, fault: BrokerError) -> None:
        """Both of our exchanges always have a queue: when one has not, somebody deleted it."""
        if message.exchange and isinstance(fault, Unroutable):
            with suppress(BrokerError):
                await self._link.declare_again()


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
    """The end of a job must outlive the broker's restart; that it began, or how far it was, is old news by then."""
    return TRANSIENT if isinstance(event, JobStarted | JobProgress) else PERSISTENT
