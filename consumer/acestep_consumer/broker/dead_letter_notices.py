# SPDX-License-Identifier: Apache-2.0
"""Consumes copies of requests that the broker dead-lettered, so that a worker publishes their terminal event.

A request that expires while it waits goes from the queue to the dead-letter exchange, and no worker gets it. So does
one whose time ran out while a worker had it, when that worker is cut off and the request is back in the queue. A second
queue of that exchange holds a copy for workers; the first one is for people. Messages that a worker dead-lettered
arrive here too and are acked: that worker has published the event already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog

from acestep_consumer.broker.consumer import consumer_arguments
from acestep_consumer.broker.dead_letter import CODE, DEATHS, death_of, format_of, returned_properties, writable
from acestep_consumer.broker.delivery import fingerprint
from acestep_consumer.broker.errors import BrokerError, Nacked, mapped
from acestep_consumer.broker.topology import GENERATE, IDENTIFIED, NOTICES, RPC_TIMEOUT_S, tier_of
from acestep_consumer.domain.parse import readable_task_id
from acestep_consumer.domain.ports import BodyFormat, Reply

if TYPE_CHECKING:
    from datetime import datetime

    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from acestep_consumer.broker.connection import BrokerConnection
    from acestep_consumer.config.settings import BrokerSettings

# Some wait until another worker's attempt is over, and others shall not wait behind them.
PREFETCH = 64
# A classic queue refuses publishes at its limit and drops nothing. But one that recovers from a crash of the broker
# with more than the limit, because unacked messages wait again, dead-letters the oldest: the jobs that were running.
OVERFULL = "maxlen"
SETTLE_TIMEOUT_S = 10.0
# A notice whose handler fails must not be redelivered at full speed.
RETURN_DELAY_S = 5.0
# Time for running notices when the worker stops; after that they are left to another worker.
STOP_TIMEOUT_S = 1.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class DeadLetterNotice:
    """A request that the broker dead-lettered."""

    body: bytes
    """The message's body."""
    message_id: str | None
    body_format: BodyFormat
    """AMQP ``content_type`` and ``content_encoding``."""
    reply: Reply
    """The AMQP properties that the terminal event echoes."""
    reason: str
    """The broker's reason: ``expired``, ``rejected``, ``maxlen``, ``delivery_limit``."""
    at: datetime | None
    """When the broker dead-lettered it, in UTC."""
    queue: str
    """The queue that it waited in."""
    fingerprint: str
    """The same as of a delivery of this message."""

    @property
    def task_id(self) -> str | None:
        """The task that it is about; None: neither body nor message has an id that can be read."""
        return readable_task_id(self.body, self.message_id, self.body_format)


NoticeHandler = Callable[[DeadLetterNotice], Awaitable[None]]
"""Publishes the terminal event, confirmed. An exception is logged, and the notice is redelivered to any worker."""


class DeadLetterNotices:
    """Consumes the notices on ``connection`` and acks each when ``handle`` has returned.

    A crash between the two makes a second event. Its tasks are its own and not aiormq's: those end with their channel,
    and close the channel that they publish on.
    """

    def __init__(self, connection: BrokerConnection, settings: BrokerSettings, handle: NoticeHandler) -> None:
        self._connection = connection
        self._handle = handle
        self._arguments = consumer_arguments(settings)
        self._tasks: set[asyncio.Task[None]] = set()
        self._channel: Channel | None = None
        self._tag = ""

    async def start(self) -> None:
        """Consume, on this channel and on every later one. Raises ``BrokerRefused``."""
        await self._connection.attach(self._consume)

    async def stop(self) -> None:
        """Take no more, and let running notices end for a second at most; the others are redelivered elsewhere."""
        self._connection.detach(self._consume)
        if self._channel is not None and not self._channel.is_closed:
            with suppress(BrokerError), mapped():
                # No answer is waited for: the broker may be silent.
                await self._channel.basic_cancel(self._tag, nowait=True, timeout=STOP_TIMEOUT_S / 2)
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=STOP_TIMEOUT_S)
        for task in set(self._tasks):
            task.cancel()
            await asyncio.wait({task})

    async def _consume(self, channel: Channel) -> None:
        self._channel, self._tag = channel, f"acestep-{uuid4().hex}"
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled_by_broker)
        with mapped():
            await channel.basic_qos(prefetch_count=PREFETCH, timeout=RPC_TIMEOUT_S)
            await channel.basic_consume(
                NOTICES, self._take, consumer_tag=self._tag, arguments=self._arguments, timeout=RPC_TIMEOUT_S
            )

    def _on_cancelled_by_broker(self, _frame: Any) -> None:
        self._connection.reconnect(f"the broker stopped sending {NOTICES}")

    async def _take(self, message: DeliveredMessage) -> None:
        task = asyncio.create_task(self._run(message), name=f"notice {message.delivery_tag}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, message: DeliveredMessage) -> None:
        notice = notice_of(message)
        try:
            if notice is not None and notice.reason == OVERFULL:
                await _put_back(message, notice.queue)
            elif notice is not None and notice.task_id is None:
                await _give_id(message, notice)
            elif notice is not None:
                await self._handle(notice)
        except Nacked:
            await asyncio.sleep(RETURN_DELAY_S)  # its queue has no room yet
            await _settle(message, ack=False)
        except Exception:
            log.exception("dead-letter notice failed, trying again", message_id=message.header.properties.message_id)
            await asyncio.sleep(RETURN_DELAY_S)
            await _settle(message, ack=False)
        else:
            await _settle(message, ack=True)


def notice_of(message: DeliveredMessage) -> DeadLetterNotice | None:
    """Return the notice; None: a worker has published the event already, or the message is no request."""
    properties = message.header.properties
    headers = properties.headers or {}
    # Workers publish dead letters without a routing key, and the broker keeps the request's. The header alone proves
    # nothing: a producer can set it too.
    if not message.routing_key and CODE in headers:
        return None
    # A notice that was given an id is published to the queue itself, which no producer may do.
    given = headers.get(DEATHS) if message.routing_key == NOTICES and not message.exchange else None
    deaths = given or headers.get("x-death")
    match deaths:
        case [{"queue": str(queue)}, *_] if queue in (GENERATE, IDENTIFIED) or tier_of(queue):
            death = death_of({"x-death": deaths})
        case _:
            log.warning("dead letter from an unknown queue ignored", message_id=properties.message_id)
            return None
    return DeadLetterNotice(
        body=message.body,
        message_id=properties.message_id or None,
        body_format=format_of(properties),
        reply=Reply(properties.reply_to or None, properties.correlation_id or None),
        reason=death.code,
        at=death.at,
        queue=queue,
        fingerprint=fingerprint(message.body, properties),
    )


async def _give_id(message: DeliveredMessage, notice: DeadLetterNotice) -> None:
    """Publish the notice again with a message id, so that its redelivery is the same job. Raises ``BrokerError``."""
    properties = returned_properties(message.header.properties)
    properties.message_id = str(uuid4())
    deaths = (message.header.properties.headers or {}).get("x-death")
    properties.headers = {**(properties.headers or {}), DEATHS: writable(deaths)}
    with mapped():
        await message.channel.basic_publish(
            notice.body, routing_key=NOTICES, properties=properties, mandatory=True, timeout=RPC_TIMEOUT_S
        )


async def _put_back(message: DeliveredMessage, queue: str) -> None:
    """Put a request back into its queue as the same request. Raises ``BrokerError``, such as ``Nacked`` when full."""
    with mapped():
        await message.channel.basic_publish(
            message.body,
            routing_key=queue,
            properties=returned_properties(message.header.properties),
            mandatory=True,
            timeout=RPC_TIMEOUT_S,
        )
    log.warning(
        "the broker restarted with a full queue: a request was put back", id=message.header.properties.message_id
    )


async def _settle(message: DeliveredMessage, *, ack: bool) -> None:
    """Ack or requeue. On a closed channel neither is needed: the notice is redelivered."""
    channel, tag = message.channel, message.delivery_tag or 0
    with suppress(BrokerError), mapped():
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            await (channel.basic_ack(tag) if ack else channel.basic_nack(tag, requeue=True))
