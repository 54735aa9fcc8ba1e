# SPDX-License-Identifier: Apache-2.0
"""Consumes the queues of tiers, to which workers with smaller GPUs forward requests.

A worker consumes the queue of its own tier, and only while messages wait there: its deliveries count against the same
prefetch. It has a queue of its own, bound to ``acestep.control`` with the routing key ``tier.<name>``: a mandatory
publish with that key is returned when the tier has no worker, and else makes its workers look at their queue. A paused
worker, which lacks disk space or storage, is not bound.

The last worker of a tier may leave while requests wait for it. Any other worker that finds them consumes them then,
whatever its GPU.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from acestep_consumer.broker.errors import BrokerError, ConnectionLost, describe, mapped
from acestep_consumer.broker.topology import CONTROL, RPC_TIMEOUT_S, TIER, consume_own_queue, tier_queue
from acestep_consumer.domain.errors import Unpublished

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from acestep_consumer.broker.connection import BrokerConnection
    from acestep_consumer.broker.consumer import Consumer

# Time for a running look at the queues to end when the worker stops.
STOP_TIMEOUT_S = 5.0
# How often it looks at its queue without a notification; a lost notification delays a request by this much.
POLL_S = 5.0
# While messages wait there.
BUSY_POLL_S = 0.25
# How often it looks at other tiers' queues, and how long these wait for their own workers: enough for a restart.
UNATTENDED_POLL_S = 10.0
UNATTENDED_S = 60.0

log = structlog.get_logger()


class TierQueues:
    """Makes ``consumer`` take messages from the queues of tiers while they hold any.

    Args:
        connection: the connection for notifications and for looking at the queues.
        consumer: consumes, and divides its prefetch.
        own: the tier of this worker's GPU.
        tiers: the names of all tiers.
        notify_tier: makes the workers of a tier look at its queue, and returns whether there are any; raises
            ``Unpublished``.
        unattended_s: seconds that a queue waits for its own workers.
    """

    def __init__(  # noqa: PLR0913 - all by name but the first two
        self,
        connection: BrokerConnection,
        consumer: Consumer,
        *,
        own: str,
        tiers: Iterable[str],
        notify_tier: Callable[[str], Awaitable[bool]],
        unattended_s: float = UNATTENDED_S,
    ) -> None:
        self._connection = connection
        self._consumer = consumer
        self._own = own
        self._tiers = tuple(tiers)
        self._others = tuple(tier for tier in self._tiers if tier != own)
        self._notify_tier = notify_tier
        self._unattended_s = unattended_s
        # Since when requests of a tier wait without a worker, and the tiers that are consumed because of that.
        self._waiting_since: dict[str, float] = {}
        self._taken: set[str] = set()
        self._wake = asyncio.Event()
        self._stopping = False
        # The queue for notifications, and whether it is bound.
        self._notifications: str | None = None
        self._bound = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Declare the queues and consume them from now on. Raises ``BrokerRefused``."""
        await self._connection.attach(self._set_up)
        with suppress(Unpublished):  # a lost connection comes back; a missing permission is an error now
            await self._notify_tier(self._own)
        self._task = asyncio.create_task(self._run(), name="tier queues")

    def look(self) -> None:
        """Look at the queues now, since something has changed."""
        self._wake.set()

    async def stop(self) -> None:
        """Take no more forwarded requests, so that they go to other workers. Running jobs are not affected."""
        self._connection.detach(self._set_up)
        self._stopping = True
        self.look()
        if self._task is not None:
            # Not cancelled at once: aiormq closes the channel under a call that is cancelled.
            await asyncio.wait({self._task}, timeout=STOP_TIMEOUT_S if self._connection.is_up else 0)
            self._task.cancel()
        if self._notifications is not None and self._connection.is_up:
            with suppress(BrokerError), mapped():
                channel = await self._connection.channel()
                await channel.queue_delete(self._notifications, timeout=RPC_TIMEOUT_S)

    async def _set_up(self, channel: Channel) -> None:
        for tier in self._tiers:
            await self._connection.declare_tier_queue(tier)
        with mapped():
            self._notifications = await consume_own_queue(channel, self._on_notification)
        # Last, because notifications must find a consumer.
        self._bound = False
        await self._update_binding(channel)
        self.look()

    async def _update_binding(self, channel: Channel) -> None:
        """Bind the queue for notifications while the consumer takes messages, and unbind it while it does not."""
        takes = self._consumer.takes
        if self._notifications is not None and takes != self._bound:
            change = channel.queue_bind if takes else channel.queue_unbind
            with mapped():
                await change(self._notifications, CONTROL, f"{TIER}.{self._own}", timeout=RPC_TIMEOUT_S)
            self._bound = takes

    async def _on_notification(self, _: DeliveredMessage) -> None:
        self.look()

    async def _run(self) -> None:
        next_unattended_poll = time.monotonic() + self._until_unattended_poll()
        while not self._stopping:
            busy = False
            try:
                await self._update_binding(await self._channel())
                busy = any([await self._take_from(tier) for tier in (self._own, *self._taken)])
                if time.monotonic() >= next_unattended_poll and self._consumer.takes:
                    await self._take_unattended()
                    next_unattended_poll = time.monotonic() + self._until_unattended_poll()
            except Unpublished as error:
                log.info("tiers cannot be notified", reason=describe(error))
            except BrokerError as fault:
                log.info("tier queues not reachable", reason=describe(fault))
                await self._release_all()
                await self._connection.channel()
            except Exception:
                # Requests are forwarded to this worker as long as its queue is bound: the task must survive.
                log.exception("tier queues: unexpected error")
            await self._sleep(BUSY_POLL_S if busy else min(POLL_S, self._unattended_s))

    async def _sleep(self, seconds: float) -> None:
        """Wait for a notification, but no longer than that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        if not self._stopping:
            self._wake.clear()

    def _until_unattended_poll(self) -> float:
        """Return seconds, at random, so that workers do not look at the same time."""
        return min(UNATTENDED_POLL_S, self._unattended_s) * random.uniform(0.5, 1.5)  # noqa: S311 - spread, not secrecy

    async def _take_from(self, tier: str) -> bool:
        """Consume the queue of this tier while messages wait there. Returns whether any do.

        With none left the consumers are cancelled at once, while their deliveries run: as those are settled, their
        share of the prefetch goes back to the producers' queue.
        """
        queue = tier_queue(tier)
        ready = await self._ready(queue)
        await self._consumer.serve(queue, ready and ready + self._consumer.unsettled(queue))
        return ready > 0

    async def _release_all(self) -> None:
        """Reserve no prefetch for queues that may be empty."""
        for tier in (self._own, *self._taken):
            await self._consumer.serve(tier_queue(tier), 0)

    async def _take_unattended(self) -> None:
        """Consume the queues of tiers without workers."""
        before, self._taken = self._taken, {tier for tier in self._others if await self._is_unattended(tier)}
        for tier in before - self._taken:
            await self._consumer.serve(tier_queue(tier), 0)
        for tier in self._taken - before:
            log.warning("tier without workers: its requests are taken here", tier=tier)
            await self._take_from(tier)

    async def _is_unattended(self, tier: str) -> bool:
        """Whether requests have waited there for ``unattended_s`` while the tier had no worker."""
        if not await self._ready(tier_queue(tier)) or await self._notify_tier(tier):
            self._waiting_since.pop(tier, None)
            return False
        since = self._waiting_since.setdefault(tier, time.monotonic())
        return time.monotonic() - since >= self._unattended_s

    async def _ready(self, queue: str) -> int:
        channel = await self._channel()
        with mapped():
            found = await channel.queue_declare(queue, passive=True, timeout=RPC_TIMEOUT_S)
        return found.message_count or 0

    async def _channel(self) -> Channel:
        """Return the open channel. Raises ``ConnectionLost`` rather than wait, which would hold prefetch."""
        if not self._connection.is_up:
            raise ConnectionLost("not connected")
        return await self._connection.channel()
