# SPDX-License-Identifier: Apache-2.0
"""What the broker gave up by itself: its producer has to hear of it, and only a worker can tell.

A request that expires while it waits goes from the queue to the exchange of dead letters, and no worker ever has it in
hand. A second queue of that exchange holds a copy for the workers; the first one stays for people. What a worker
dead-lettered comes by here too and is let go: that worker has told already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog

from acestep_consumer.broker.consumer import CONSUMER_TIMEOUT_MS
from acestep_consumer.broker.dead_letter import CODE, death_of, returned_properties
from acestep_consumer.broker.errors import BrokerError, Nacked, mapped
from acestep_consumer.broker.topology import GENERATE, NOTICES, tier_of
from acestep_consumer.domain.ports import Reply

if TYPE_CHECKING:
    from datetime import datetime

    from aiormq.abc import ArgumentsType, DeliveredMessage
    from aiormq.channel import Channel

    from acestep_consumer.broker.connection import BrokerConnection
    from acestep_consumer.config.settings import BrokerSettings

PREFETCH = 8
# A classic queue refuses publishes at its limit and gives nothing up. But one that comes back from a crash of the
# broker with more than the limit, because what was in hand is waiting again, gives up the oldest: the work in hand.
OVERFULL = "maxlen"
RPC_TIMEOUT_S = 10.0
SETTLE_TIMEOUT_S = 10.0
# A notice that cannot be told must not circle between us and the broker at full speed.
RETURN_DELAY_S = 5.0
# What a notice in hand has to end when the worker stops; then it is left to the next one.
STOP_TIMEOUT_S = 5.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DeadLetterNotice:
    """A request that the broker gave up before a worker ended it."""

    body: bytes
    """As it came."""
    message_id: str | None
    sent: datetime | None
    """The producer's ``timestamp``, in UTC."""
    reply: Reply
    """Where the terminal event is awaited besides the exchange."""
    reason: str
    """The broker's own word: ``expired``, ``rejected``, ``maxlen``, ``delivery_limit``."""
    at: datetime | None
    """When the broker gave it up, in UTC."""
    queue: str
    """The queue that it waited in."""


Tell = Callable[[DeadLetterNotice], Awaitable[None]]
"""Publish the terminal event, confirmed. What escapes is logged, and the notice comes again, here or elsewhere."""


class DeadLetterNotices:
    """Consumes the notices on ``link`` and hands to ``tell`` what nobody has told yet; acked once that returned.

    A crash between the two tells twice. The tasks are ours, not the client library's: those die with their channel,
    and take down the channel that they publish on.
    """

    def __init__(self, link: BrokerConnection, settings: BrokerSettings, tell: Tell) -> None:
        self._link = link
        self._tell = tell
        self._arguments: ArgumentsType = {}
        if settings.queue_type == "quorum":
            self._arguments["x-consumer-timeout"] = CONSUMER_TIMEOUT_MS
        self._tasks: set[asyncio.Task[None]] = set()
        self._channel: Channel | None = None
        self._tag = ""

    async def start(self) -> None:
        """Consume, on this channel and on every later one. Raises ``BrokerRefused``."""
        await self._link.attach(self._consume)

    async def stop(self) -> None:
        """Take no more, and let what is in hand end, for 5 seconds at most. What is not told comes again elsewhere."""
        self._link.detach(self._consume)
        if self._channel is not None and not self._channel.is_closed:
            with suppress(BrokerError), mapped():
                await self._channel.basic_cancel(self._tag, timeout=RPC_TIMEOUT_S)
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
        self._link.renew(f"the broker stopped sending {NOTICES}")

    async def _take(self, message: DeliveredMessage) -> None:
        task = asyncio.create_task(self._run(message), name=f"notice {message.delivery_tag}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, message: DeliveredMessage) -> None:
        notice = notice_of(message)
        try:
            if notice is not None and notice.reason == OVERFULL:
                await _give_back(message, notice.queue)
            elif notice is not None:
                await self._tell(notice)
        except Nacked:
            await asyncio.sleep(RETURN_DELAY_S)  # no room for it yet
            await _settle(message, told=False)
        except Exception:  # noqa: BLE001 - the last line of defence: whatever it was, the notice comes again
            _log.exception("notice not told, trying again", message_id=message.header.properties.message_id)
            await asyncio.sleep(RETURN_DELAY_S)
            await _settle(message, told=False)
        else:
            await _settle(message, told=True)


def notice_of(message: DeliveredMessage) -> DeadLetterNotice | None:
    """Return what is to be told about a dead letter; None: a worker has told, or it never was a request."""
    properties = message.header.properties
    headers = properties.headers or {}
    # Workers publish dead letters without a routing key; the broker keeps the request's, which has one. The header
    # alone proves nothing: a producer can write it too.
    if not message.routing_key and CODE in headers:
        return None
    match headers.get("x-death"):
        case [{"queue": str(queue)}, *_] if queue == GENERATE or tier_of(queue):
            death = death_of({name: value for name, value in headers.items() if name != CODE})
        case _:
            _log.warning("no request of ours among the dead letters, left alone", message_id=properties.message_id)
            return None
    return DeadLetterNotice(
        body=message.body,
        message_id=properties.message_id or None,
        sent=properties.timestamp,
        reply=Reply(properties.reply_to or None, properties.correlation_id or None),
        reason=death.code,
        at=death.at,
        queue=queue,
    )


async def _give_back(message: DeliveredMessage, queue: str) -> None:
    """Put a request back into its queue as the one that it was. Raises ``BrokerError``: the queue may be full."""
    with mapped():
        await message.channel.basic_publish(
            message.body,
            routing_key=queue,
            properties=returned_properties(message.header.properties),
            mandatory=True,
            timeout=RPC_TIMEOUT_S,
        )
    _log.warning(
        "the broker restarted with a full queue: a request is back in it", id=message.header.properties.message_id
    )


async def _settle(message: DeliveredMessage, *, told: bool) -> None:
    """Ack, or give back. On a channel that is gone neither is needed: the notice comes again."""
    channel, tag = message.channel, message.delivery_tag or 0
    with suppress(BrokerError), mapped():
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            await (channel.basic_ack(tag) if told else channel.basic_nack(tag, requeue=True))
