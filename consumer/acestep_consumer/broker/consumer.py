# SPDX-License-Identifier: Apache-2.0
"""Consumes requests: holds as many unacked deliveries as the prefetch allows and runs each in a task of its own.

Most come from the producers' queue; some from tier queues, as long as these have something. When the prefetch changes,
or how it is shared among queues (``prefetch_shares``), nothing is redelivered, and nothing new arrives before fewer
deliveries are unacked than the new prefetch. (A limit for the whole channel could be changed in place and would span
queues, but quorum queues do not know it and RabbitMQ 4 deprecates it.)
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog
from aiormq.channel import Channel

from acestep_consumer.broker.delivery import AmqpDelivery
from acestep_consumer.broker.errors import BrokerError, describe, mapped
from acestep_consumer.broker.prefetch_shares import PrefetchShare, next_start, next_stop
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.topology import GENERATE
from acestep_consumer.domain.errors import Verdict

if TYPE_CHECKING:
    from aiormq.abc import ArgumentsType, DeliveredMessage

    from acestep_consumer.broker.connection import BrokerConnection
    from acestep_consumer.config.settings import BrokerSettings

Handle = Callable[[AmqpDelivery], Awaitable[None]]
"""Run one message and settle it. What escapes is logged, and the message goes back to the queue."""

RPC_TIMEOUT_S = 10.0
# A message that fails us at once must not circle between us and the broker at full speed.
RETURN_DELAY_S = 1.0
# What a task has to end after it was cancelled, before its message goes back all the same.
CANCEL_TIMEOUT_S = 10.0
# RabbitMQ 4 takes a message of a quorum queue back from a consumer after 30 minutes; a job may take longer. Heartbeats
# tell whether the worker lives. Classic queues of 4.3 know no such limit and refuse the argument.
CONSUMER_TIMEOUT_MS = 7 * 24 * 3600 * 1000

# A quarter of a second for messages that are on their way to a consumer that is about to be cancelled.
_ARRIVAL_POLLS, _POLL_S = 50, 0.005

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _InHand:
    tag: str
    queue: str
    delivery: AmqpDelivery


class Consumer:
    """Consumes ``acestep.generate``, and what else it shall serve, on ``link``; hands every delivery to ``handle``.

    The tasks are ours, not the client library's: those die with their channel, and a job that has the GPU must not.
    It runs on while its message is delivered again; its own delivery is stale then.
    """

    def __init__(self, link: BrokerConnection, settings: BrokerSettings, handle: Handle, outbox: Publisher) -> None:
        self._link = link
        self._handle = handle
        self._outbox = outbox
        self._prefetch = settings.workers_at_start
        self._arguments: ArgumentsType = {}
        if settings.queue_type == "quorum":
            self._arguments["x-consumer-timeout"] = CONSUMER_TIMEOUT_MS
        self._tasks: dict[asyncio.Task[None], _InHand] = {}
        self._finished = 0
        self._channel: Channel | None = None
        # Of the present channel, by consumer tag, the oldest first.
        self._shares: dict[str, PrefetchShare] = {}
        # How many of the deliveries may be of other queues than the producers'.
        self._served: dict[str, int] = {}
        self._leaving = False
        self._paused_by: set[str] = set()
        self._changing = asyncio.Lock()
        self._fitting: asyncio.Task[None] | None = None

    @property
    def in_hand(self) -> int:
        """Deliveries whose handler has not returned."""
        return len(self._tasks)

    @property
    def finished(self) -> int:
        """Deliveries that their handler has settled so far."""
        return self._finished

    @property
    def prefetch(self) -> int:
        """Deliveries that the broker may leave with us unsettled."""
        return self._prefetch

    @property
    def takes(self) -> bool:
        """Whether new deliveries may come; not while it pauses or leaves."""
        return not self._paused_by and not self._leaving

    async def start(self) -> None:
        """Consume, on this channel and on every later one. Raises ``BrokerRefused``."""
        await self._link.attach(self._consume)

    async def set_prefetch(self, count: int) -> None:
        """Let ``count`` deliveries be in hand from now on; on later channels too. Nothing in hand is delivered again.

        A smaller count takes nothing back: new deliveries come when enough of the old ones are settled.
        """
        self._prefetch = count
        # Shielded: the client library closes the channel under a call that is cancelled, and with it all work in hand.
        await asyncio.shield(self._fit_soon())

    async def serve(self, queue: str, count: int) -> None:
        """Let up to ``count`` of the deliveries in hand be of this queue too, and so many fewer of the producers'.

        It goes first. 0: take nothing new from it.
        """
        if self._served.get(queue, 0) != count:
            self._served[queue] = count
            await asyncio.shield(self._fit_soon())

    def held(self, queue: str) -> int:
        """Return how many deliveries of this queue are in hand, ours to settle and not settled."""
        held = (each.delivery for each in self._tasks.values() if each.queue == queue)
        return sum(not delivery.settled and not delivery.stale for delivery in held)

    async def pause(self, reason: str) -> None:
        """Take nothing new while this reason lasts, or another one. What is in hand stays in hand."""
        self._paused_by.add(reason)
        await asyncio.shield(self._fit_soon())

    async def resume(self, reason: str) -> None:
        """Forget this reason; with none left, consume again."""
        self._paused_by.discard(reason)
        await asyncio.shield(self._fit_soon())

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, let the work in hand end, for ``grace_s`` seconds at most, then stop."""
        await self._take_no_more()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=grace_s)
        await self.stop()

    async def stop(self) -> None:
        """Cancel the work in hand and give its messages back to the queue. The link must still be open."""
        await self._take_no_more()
        unfinished = dict(self._tasks)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(set(unfinished), timeout=CANCEL_TIMEOUT_S)
        for held in unfinished.values():
            if not held.delivery.settled:
                await held.delivery.settle(Verdict.REQUEUE)

    async def _take_no_more(self) -> None:
        """Cancel the consumers. What is in hand stays ours to settle."""
        self._leaving = True
        self._link.detach(self._consume)
        async with self._changing:
            for tag in list(self._shares):
                with suppress(BrokerError):
                    await self._cancel(tag)

    async def _consume(self, channel: Channel) -> None:
        """Start on a new channel: what was in hand on the old one is stale, and comes again."""
        async with self._changing:
            self._channel = channel
            self._shares.clear()
            # Whether these queues are still there and hold something is for their keeper to say anew. One that is gone
            # would else keep this channel, and the producers' queue with it, from ever being served.
            self._served.clear()
            channel.on_consumer_cancel_callbacks.add(self._on_cancelled_by_broker)
            await self._arrange(channel)

    def _fit_soon(self) -> asyncio.Task[None]:
        """Start ``_fit`` unless it runs; it looks at what is in hand once more before it ends."""
        if self._fitting is None or self._fitting.done():
            self._fitting = asyncio.create_task(self._fit(), name="prefetch")
        return self._fitting

    async def _fit(self) -> None:
        """Share the prefetch out anew, as far as deliveries of cancelled consumers leave room."""
        async with self._changing:
            channel = self._channel
            if channel is None or channel.is_closed or self._leaving:
                return  # the next channel starts with the new count
            try:
                await self._arrange(channel)
            except BrokerError as fault:
                self._link.renew(f"the prefetch could not be changed: {describe(fault)}")

    async def _arrange(self, channel: Channel) -> None:
        """Make moves until there is none left. What is wanted may change with each."""
        while True:
            held = self._shares, self._left_over(), self._targets(), self._prefetch
            if tag := next_stop(*held):
                await self._full(tag)
                await self._cancel(tag)
            elif share := next_start(*held):
                await self._add_consumer(channel, share)
            else:
                return

    def _targets(self) -> dict[str, int]:
        """How many deliveries may be in hand, by queue; the producers' queue has what the others leave."""
        if self._paused_by:
            return {}
        targets, left = {}, self._prefetch
        for queue, count in self._served.items():
            targets[queue] = min(count, left)
            left -= targets[queue]
        return {**targets, GENERATE: left}

    def _left_over(self) -> Counter[str]:
        """Deliveries in hand whose consumer is gone, by queue."""
        held = self._tasks.values()
        return Counter(each.queue for each in held if each.tag not in self._shares and not each.delivery.stale)

    async def _full(self, tag: str) -> None:
        """Wait until nothing can be on its way to this consumer: it is full, or the queue has nothing for it.

        What arrives at a quorum queue's consumer after its end goes back, and counts as an attempt that never was.
        """
        for _ in range(_ARRIVAL_POLLS):
            if self._unsettled(tag) >= self._shares[tag].count:
                return
            await asyncio.sleep(_POLL_S)

    def _unsettled(self, tag: str) -> int:
        return sum(held.tag == tag and not held.delivery.settled for held in self._tasks.values())

    async def _add_consumer(self, channel: Channel, share: PrefetchShare) -> None:
        """Set the prefetch and start. In this order: it holds for consumers that start after it, and only for them.

        The tag is new each time: RabbitMQ 4.3 may keep the old one after it has cancelled a consumer.
        """
        tag = f"acestep-{uuid4().hex}"
        self._shares[tag] = share
        with mapped():
            await channel.basic_qos(prefetch_count=share.count, timeout=RPC_TIMEOUT_S)
            await channel.basic_consume(
                share.queue,
                partial(self._take, tag, share.queue),
                consumer_tag=tag,
                arguments=self._arguments,
                timeout=RPC_TIMEOUT_S,
            )

    async def _cancel(self, tag: str) -> None:
        """Stop this consumer. Raises ``BrokerError``."""
        del self._shares[tag]
        if self._channel is not None and not self._channel.is_closed:
            with mapped():
                await self._channel.basic_cancel(tag, timeout=RPC_TIMEOUT_S)

    def _on_cancelled_by_broker(self, _frame: Any) -> None:
        # The queue was deleted or moved, or a delivery took too long. The old channel cannot be trusted: RabbitMQ 4.3
        # goes on delivering to a consumer that the client has forgotten.
        self._link.renew("the broker cancelled the consumer")

    async def _take(self, tag: str, queue: str, message: DeliveredMessage) -> None:
        delivery = AmqpDelivery(message, self._outbox)
        run = self._give_back if self._leaving else self._run
        task = asyncio.create_task(run(delivery), name=f"delivery {message.delivery_tag}")
        self._tasks[task] = _InHand(tag, queue, delivery)
        task.add_done_callback(partial(self._on_end, tag))

    def _on_end(self, tag: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task)
        if tag not in self._shares and not self._leaving:
            self._fit_soon()

    async def _run(self, delivery: AmqpDelivery) -> None:
        try:
            await self._handle(delivery)
        except Exception:  # noqa: BLE001 - the last line of defence: whatever it was, the message goes back
            _log.exception("handler failed", message_id=delivery.message_id, settled=delivery.settled)
        if delivery.settled:
            self._finished += 1
        else:
            await asyncio.sleep(RETURN_DELAY_S)
            await self._give_back(delivery)

    async def _give_back(self, delivery: AmqpDelivery) -> None:
        await delivery.settle(Verdict.REQUEUE)
