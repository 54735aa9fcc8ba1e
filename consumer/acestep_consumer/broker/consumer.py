# SPDX-License-Identifier: Apache-2.0
"""Consumes requests: holds as many unacked deliveries as the prefetch allows and runs each in a task of its own.

Most come from the producers' queue; some from tier queues, as long as messages wait there. When the prefetch changes,
or its division among queues (``prefetch_shares``), nothing is redelivered, and nothing new arrives before fewer
deliveries are unacked than the new prefetch. (A limit for the whole channel could be changed in place and would span
queues, but quorum queues do not support it and RabbitMQ 4 deprecates it.)
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
from acestep_consumer.broker.topology import GENERATE, IDENTIFIED, RPC_TIMEOUT_S
from acestep_consumer.domain.errors import Verdict

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel, ArgumentsType, DeliveredMessage
    from pamqp.commands import Basic

    from acestep_consumer.broker.connection import BrokerConnection
    from acestep_consumer.config.settings import BrokerSettings

Handle = Callable[[AmqpDelivery], Awaitable[None]]
"""Runs one message and settles it. An exception is logged, and the message is requeued."""

# A message whose handler fails at once must not be redelivered at full speed.
RETURN_DELAY_S = 1.0
# Time for a cancelled task to end, before its message is requeued regardless.
CANCEL_TIMEOUT_S = 10.0
# RabbitMQ 4 requeues a delivery of a quorum queue that stays unacked for 30 minutes; a job may take longer, and
# heartbeats show whether the worker is alive. Classic queues of 4.3 have no such limit and refuse the argument.
CONSUMER_TIMEOUT_MS = 7 * 24 * 3600 * 1000

# A quarter of a second for deliveries in flight to a consumer that is about to be cancelled.
_ARRIVAL_POLLS, _POLL_S = 50, 0.005

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _RunningDelivery:
    tag: str
    queue: str
    delivery: AmqpDelivery


def consumer_arguments(settings: BrokerSettings) -> ArgumentsType:
    """Return the arguments of ``basic.consume``."""
    return {"x-consumer-timeout": CONSUMER_TIMEOUT_MS} if settings.queue_type == "quorum" else {}


class Consumer:
    """Consumes ``acestep.generate`` and, on request, tier queues; calls ``handle`` with each delivery.

    Its tasks are its own and not aiormq's: those end with their channel, and a job that has the GPU must not. The job
    goes on while its message is redelivered; its own delivery is stale then.

    Args:
        connection: the connection to consume on.
        settings: prefetch and queue type.
        handle: runs one message.
        publisher: publishes dead letters and forwarded messages.
    """

    def __init__(
        self, connection: BrokerConnection, settings: BrokerSettings, handle: Handle, publisher: Publisher
    ) -> None:
        self._connection = connection
        self._handle = handle
        self._publisher = publisher
        self._prefetch = settings.workers_at_start
        self._arguments = consumer_arguments(settings)
        self._tasks: dict[asyncio.Task[None], _RunningDelivery] = {}
        self._finished = 0
        self._channel: Channel | None = None
        # Of the present channel, by consumer tag, the oldest first.
        self._shares: dict[str, PrefetchShare] = {}
        # Deliveries that may come from each tier queue.
        self._tier_targets: dict[str, int] = {}
        self._draining = False
        self._started = False
        self._paused_by: set[str] = set()
        self._changing = asyncio.Lock()
        self._adjusting: asyncio.Task[None] | None = None
        self._copying = 0
        self.identified = asyncio.Event()
        """Set when a message was given an id, for whoever keeps an eye on their queue."""

    @property
    def in_hand(self) -> int:
        """Deliveries whose handler has not returned: running jobs."""
        return len(self._tasks)

    @property
    def finished(self) -> int:
        """Deliveries whose jobs have ended here so far; those requeued or handed on to another queue are none."""
        return self._finished

    @property
    def prefetch(self) -> int:
        """Most deliveries that may be unsettled at a time."""
        return self._prefetch

    @property
    def takes(self) -> bool:
        """Whether it takes new deliveries: not while it is paused or draining."""
        return not self._paused_by and not self._draining

    @property
    def started(self) -> bool:
        """Whether it consumes on this channel, if there is one, and on every later one."""
        return self._started

    async def start(self) -> None:
        """Consume, on this channel and on every later one. Raises ``BrokerRefused``."""
        await self._connection.attach(self._consume)
        self._started = True

    async def set_prefetch(self, count: int) -> None:
        """Set the prefetch, also for later channels. Running jobs are not affected, and nothing is redelivered.

        With a smaller count, new deliveries come when enough of the old ones are settled.
        """
        self._prefetch = count
        # Shielded: aiormq closes the channel under a call that is cancelled, which would make all deliveries stale.
        await asyncio.shield(self._adjust_soon())

    async def serve(self, queue: str, count: int) -> None:
        """Take up to ``count`` unsettled deliveries from this tier queue, before those of the producers' queue.

        They count against the prefetch. 0: take nothing new from it.
        """
        if self._tier_targets.get(queue, 0) != count:
            self._tier_targets[queue] = count
            await asyncio.shield(self._adjust_soon())

    def unsettled(self, queue: str) -> int:
        """Return how many deliveries of this queue are neither settled nor stale."""
        deliveries = (each.delivery for each in self._tasks.values() if each.queue == queue)
        return sum(not delivery.settled and not delivery.stale for delivery in deliveries)

    @property
    def copying(self) -> int:
        """Number of messages that are being given an id: each has a place reserved for its copy."""
        return self._copying

    async def pause(self, reason: str) -> None:
        """Take nothing new for this reason, until ``resume`` is called for it. Running jobs are not affected."""
        self._paused_by.add(reason)
        await asyncio.shield(self._adjust_soon())

    async def resume(self, reason: str) -> None:
        """Withdraw this reason; with none left, consume again."""
        self._paused_by.discard(reason)
        await asyncio.shield(self._adjust_soon())

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, let running jobs end for ``grace_s`` seconds at most, and requeue the others."""
        await self.stop_consuming()
        await self.finish(grace_s)

    async def finish(self, grace_s: float) -> None:
        """Let running jobs end for ``grace_s`` seconds at most, then cancel them and requeue their messages.

        The connection must still be open; no answer of the broker is waited for.
        """
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=grace_s)
        unfinished = dict(self._tasks)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(set(unfinished), timeout=CANCEL_TIMEOUT_S)
        left = [each.delivery for each in unfinished.values() if not each.delivery.settled]
        await asyncio.gather(*(delivery.settle(Verdict.REQUEUE) for delivery in left))

    async def stop_consuming(self) -> None:
        """Take nothing new: cancel the consumers. Running deliveries can still be settled."""
        self._draining = True
        self._connection.detach(self._consume)
        async with self._changing:
            for tag in list(self._shares):
                with suppress(BrokerError):
                    await self._cancel(tag)

    async def _consume(self, channel: Channel) -> None:
        """Consume on a new channel; deliveries of the old one are stale and will be redelivered."""
        async with self._changing:
            self._channel = channel
            self._shares.clear()
            # TierQueues sets these again when it has looked at the queues: consuming from one that was deleted would
            # close this channel each time, and the producers' queue would never be consumed.
            self._tier_targets.clear()
            channel.on_consumer_cancel_callbacks.add(self._on_cancelled_by_broker)
            await self._adjust_consumers(channel)

    def _adjust_soon(self) -> asyncio.Task[None]:
        """Start ``_adjust`` unless it runs; it compares shares and deliveries once more before it ends."""
        if self._adjusting is None or self._adjusting.done():
            self._adjusting = asyncio.create_task(self._adjust(), name="prefetch")
        return self._adjusting

    async def _adjust(self) -> None:
        """Divide the prefetch again, as far as deliveries of cancelled consumers leave room."""
        async with self._changing:
            channel = self._channel
            if channel is None or channel.is_closed or self._draining:
                return  # the next channel starts with the new count
            try:
                await self._adjust_consumers(channel)
            except BrokerError as fault:
                if not channel.is_closed:  # else it reconnects already, and the new connection is not to be lost, too
                    self._connection.reconnect(f"the prefetch could not be changed: {describe(fault)}")
            except Exception:
                log.exception("the prefetch could not be changed")
                self._connection.reconnect("the prefetch could not be changed: unexpected error")

    async def _adjust_consumers(self, channel: Channel) -> None:
        """Stop and start consumers until the shares fit. The targets may change meanwhile."""
        while True:
            state = self._shares, self._left_over(), self._targets(), self._prefetch
            if tag := next_stop(*state):
                await self._wait_until_full(tag)
                await self._cancel(tag)
            elif share := next_start(*state):
                await self._add_consumer(channel, share)
            else:
                return

    def _targets(self) -> dict[str, int]:
        """Return how many deliveries each queue may have; the producers' queue gets what the tier queues leave."""
        if self._paused_by:
            return {}
        targets, left = {}, self._prefetch
        for queue, count in self._tier_targets.items():
            targets[queue] = min(count, left)
            left -= targets[queue]
        return {**targets, GENERATE: left}

    def _left_over(self) -> Counter[str]:
        """Count running deliveries whose consumer was cancelled, by queue."""
        running = self._tasks.values()
        return Counter(
            each.queue
            for each in running
            if each.tag not in self._shares and not (each.delivery.stale or each.delivery.settled)
        )

    async def _wait_until_full(self, tag: str) -> None:
        """Wait until no delivery can be in flight to this consumer: it is full, or the queue is empty.

        A delivery that reaches a quorum queue's consumer after its end is requeued, and counts as an attempt.
        """
        for _ in range(_ARRIVAL_POLLS):
            if self._unsettled_by(tag) >= self._shares[tag].count:
                return
            await asyncio.sleep(_POLL_S)

    def _unsettled_by(self, tag: str) -> int:
        return sum(each.tag == tag and not each.delivery.settled for each in self._tasks.values())

    async def _add_consumer(self, channel: Channel, share: PrefetchShare) -> None:
        """Set the prefetch and start a consumer: a prefetch holds for consumers that start after it, and no others.

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
        """Cancel this consumer. Raises ``BrokerError``."""
        del self._shares[tag]
        if self._channel is not None and not self._channel.is_closed:
            with mapped():
                await self._channel.basic_cancel(tag, timeout=RPC_TIMEOUT_S)

    def _on_cancelled_by_broker(self, _frame: Any) -> None:
        # The queue was deleted or moved, or a delivery took too long. RabbitMQ 4.3 goes on delivering to a consumer
        # that aiormq has forgotten, so the old channel cannot be used.
        self._connection.reconnect("the broker cancelled the consumer")

    async def _identify(self, body: bytes, properties: Basic.Properties, original: AbstractChannel) -> None:
        """Reserve a place for a message, and publish it with its new id.

        In this order, since nothing may delay the original's ack once the copy is there: a worker that is cut off in
        between leaves two jobs of one message.
        """
        self._copying += 1
        try:
            await self.serve(IDENTIFIED, self._tier_targets.get(IDENTIFIED, 0) + 1)
            await self._publisher.identify(body, properties, original)
        finally:
            self._copying -= 1
            self.identified.set()

    async def _take(self, tag: str, queue: str, message: DeliveredMessage) -> None:
        delivery = AmqpDelivery(message, self._publisher, self._identify)
        run = self._requeue if self._draining else self._run
        task = asyncio.create_task(run(delivery), name=f"delivery {message.delivery_tag}")
        self._tasks[task] = _RunningDelivery(tag, queue, delivery)
        task.add_done_callback(partial(self._on_end, tag))

    def _on_end(self, tag: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task)
        if tag not in self._shares and not self._draining:
            self._adjust_soon()

    async def _run(self, delivery: AmqpDelivery) -> None:
        try:
            await self._handle(delivery)
        except Exception:
            log.exception("handler failed", message_id=delivery.message_id, settled=delivery.settled)
        if delivery.done:
            self._finished += 1
        elif not delivery.settled:
            await asyncio.sleep(RETURN_DELAY_S)
            await self._requeue(delivery)

    async def _requeue(self, delivery: AmqpDelivery) -> None:
        await delivery.settle(Verdict.REQUEUE)
