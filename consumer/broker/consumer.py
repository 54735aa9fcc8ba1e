# SPDX-License-Identifier: Apache-2.0
"""The way in: as many deliveries in hand as there are workers, each in a task of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog
from aiormq.channel import Channel

from consumer.broker.delivery import DeadLetters, Delivery
from consumer.broker.faults import LinkLost, mapped
from consumer.broker.topology import GENERATE
from consumer.errors import Verdict

if TYPE_CHECKING:
    from aiormq.abc import ArgumentsType, DeliveredMessage

    from consumer.broker.connection import Link
    from consumer.settings import BrokerSettings

Handle = Callable[[Delivery], Awaitable[None]]
"""Run one message and settle it. What escapes is logged, and the message goes back to the queue."""

RPC_TIMEOUT_S = 10.0
# A message that fails us at once must not circle between us and the broker at full speed.
RETURN_DELAY_S = 1.0
# What a task has to end after it was cancelled, before its message goes back all the same.
CANCEL_TIMEOUT_S = 10.0
# RabbitMQ 4 takes a message of a quorum queue back from a consumer after 30 minutes; a job may take longer. Heartbeats
# tell whether the worker lives. Classic queues of 4.3 know no such limit and refuse the argument.
CONSUMER_TIMEOUT_MS = 7 * 24 * 3600 * 1000

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Consumer:
    """Consumes ``acestep.generate`` on ``link`` and hands every delivery to ``handle``.

    The tasks are ours, not the client library's: those die with their channel, and a job that has the GPU must not.
    It runs on while its message is delivered again; its own delivery is stale then.
    """

    def __init__(self, link: Link, settings: BrokerSettings, handle: Handle, dead_letters: DeadLetters) -> None:
        self._link = link
        self._handle = handle
        self._dead_letters = dead_letters
        self._prefetch = settings.queue_workers
        self._arguments: ArgumentsType = {}
        if settings.queue_type == "quorum":
            self._arguments["x-consumer-timeout"] = CONSUMER_TIMEOUT_MS
        self._tasks: dict[asyncio.Task[None], Delivery] = {}
        self._consuming: tuple[Channel, str] | None = None
        self._leaving = False
        self._changing = asyncio.Lock()

    @property
    def in_hand(self) -> int:
        """Deliveries whose handler has not returned."""
        return len(self._tasks)

    @property
    def prefetch(self) -> int:
        """Deliveries that the broker may leave with us unsettled."""
        return self._prefetch

    async def start(self) -> None:
        """Consume, on this channel and on every later one. Raises ``BrokerRefused``."""
        await self._link.attach(self._consume)

    async def set_prefetch(self, count: int) -> None:
        """Let ``count`` deliveries be in hand from now on. Nothing in hand is delivered again.

        A smaller count does not take anything back: the old deliveries are worked off beside the new ones.
        """
        async with self._changing:
            self._prefetch = count
            channel = await self._cancel()
            if channel is None:
                return  # the next channel starts with the new count
            try:
                await self._consume(channel)
            except LinkLost:
                self._link.renew("the prefetch could not be changed")

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, let the work in hand end, for ``grace_s`` seconds at most, then stop."""
        self._leaving = True
        self._link.detach(self._consume)
        async with self._changing:
            await self._cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=grace_s)
        await self.stop()

    async def stop(self) -> None:
        """Cancel the work in hand and give its messages back to the queue. The link must still be open."""
        self._leaving = True
        self._link.detach(self._consume)
        async with self._changing:
            await self._cancel()
        unfinished = dict(self._tasks)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(set(unfinished), timeout=CANCEL_TIMEOUT_S)
        for delivery in unfinished.values():
            if not delivery.settled:
                await delivery.settle(Verdict.REQUEUE)

    async def _consume(self, channel: Channel) -> None:
        """Set the prefetch and start. In this order: it holds for consumers that start after it, and only for them.

        The tag is new each time: RabbitMQ 4.3 may keep the old one after it has cancelled a consumer.
        """
        tag = f"acestep-{uuid4().hex}"
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled_by_broker)
        with mapped():
            await channel.basic_qos(prefetch_count=self._prefetch, timeout=RPC_TIMEOUT_S)
            await channel.basic_consume(
                GENERATE, self._take, consumer_tag=tag, arguments=self._arguments, timeout=RPC_TIMEOUT_S
            )
        self._consuming = (channel, tag)

    async def _cancel(self) -> Channel | None:
        """Stop consuming. What is in hand stays ours to settle. Returns the channel while it is open."""
        consuming, self._consuming = self._consuming, None
        if consuming is None or consuming[0].is_closed:
            return None
        channel, tag = consuming
        try:
            with mapped():
                await channel.basic_cancel(tag, timeout=RPC_TIMEOUT_S)
        except LinkLost:
            return None
        return channel

    def _on_cancelled_by_broker(self, _frame: Any) -> None:
        # The queue was deleted or moved, or a delivery took too long. The old channel cannot be trusted: RabbitMQ 4.3
        # goes on delivering to a consumer that the client has forgotten.
        self._link.renew("the broker cancelled the consumer")

    async def _take(self, message: DeliveredMessage) -> None:
        delivery = Delivery(message, self._dead_letters)
        run = self._give_back if self._leaving else self._run
        task = asyncio.create_task(run(delivery), name=f"delivery {message.delivery_tag}")
        self._tasks[task] = delivery
        task.add_done_callback(self._tasks.pop)

    async def _run(self, delivery: Delivery) -> None:
        try:
            await self._handle(delivery)
        except Exception:  # noqa: BLE001 - the last line of defence: whatever it was, the message goes back
            _log.exception("handler failed", message_id=delivery.message_id, settled=delivery.settled)
        if not delivery.settled:
            await asyncio.sleep(RETURN_DELAY_S)
            await self._give_back(delivery)

    async def _give_back(self, delivery: Delivery) -> None:
        await delivery.settle(Verdict.REQUEUE)
