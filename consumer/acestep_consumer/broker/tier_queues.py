# SPDX-License-Identifier: Apache-2.0
"""The queues of what smaller cards sent on: who serves which, and when.

A worker serves the queue of its own tier, and only while that has something: its deliveries come out of the same
prefetch. It lets senders know that it is there by a queue of its own, bound to ``acestep.control`` under
``tier.<name>``: a mandatory publish with that key comes back when nobody of the tier is there, and else makes those
who are look at their queue. Who pauses, for want of disk or storage, is not there.

The last worker of a tier may leave while requests wait for it. Then whoever finds them serves them, whatever the card.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog

from acestep_consumer.broker.errors import BrokerError, ConnectionLost, describe, mapped
from acestep_consumer.broker.topology import CONTROL, TIER, tier_queue
from acestep_consumer.domain.errors import Unpublished

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from acestep_consumer.broker.connection import BrokerConnection
    from acestep_consumer.broker.consumer import Consumer

RPC_TIMEOUT_S = 10.0
# What a look has to end when the worker leaves.
STOP_TIMEOUT_S = 5.0
# Without a call; a call that got lost costs this much.
LOOK_S = 5.0
# While there is something to take.
LOOK_AGAIN_S = 0.25
# The other tiers' queues, and how long one waits for its own workers before others take over: time for a restart.
LOOK_ROUND_S = 10.0
ORPHANED_S = 60.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class TierQueues:
    """Has ``consumer`` serve the queues of tiers as they need it.

    Args:
        link: to listen and to look on.
        consumer: shares its prefetch out.
        own: the tier of this worker's card.
        tiers: the names of all tiers.
        call: tells whether a worker of a tier is there; raises ``Unpublished``.
        orphaned_s: seconds that a queue waits for its own workers.
    """

    def __init__(  # noqa: PLR0913 - all by name but the first two
        self,
        link: BrokerConnection,
        consumer: Consumer,
        *,
        own: str,
        tiers: Iterable[str],
        call: Callable[[str], Awaitable[bool]],
        orphaned_s: float = ORPHANED_S,
    ) -> None:
        self._link = link
        self._consumer = consumer
        self._own = own
        self._tiers = tuple(tiers)
        self._others = tuple(tier for tier in self._tiers if tier != own)
        self._call = call
        self._orphaned_s = orphaned_s
        # Since when requests of a tier wait with nobody there, and the tiers that are served because of it.
        self._waiting_since: dict[str, float] = {}
        self._adopted: set[str] = set()
        self._called = asyncio.Event()
        self._leaving = False
        self._ear: str | None = None
        # Whether calls come to it.
        self._bound = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Declare the queues and serve them from now on. Raises ``BrokerRefused``."""
        await self._link.attach(self._listen)
        with suppress(Unpublished):  # a link that is lost just now comes back; a user who may not call must know
            await self._call(self._own)
        self._task = asyncio.create_task(self._run(), name="tier queues")

    def look(self) -> None:
        """Look at the queues now: something has changed."""
        self._called.set()

    async def stop(self) -> None:
        """Be there no more: what is sent on now goes elsewhere. What is in hand stays in hand."""
        self._link.detach(self._listen)
        self._leaving = True
        self.look()
        if self._task is not None:
            # Not cancelled at once: the client library closes the channel under a call that is cancelled.
            await asyncio.wait({self._task}, timeout=STOP_TIMEOUT_S if self._link.is_up else 0)
            self._task.cancel()
        if self._ear is not None and self._link.is_up:
            with suppress(BrokerError), mapped():
                channel = await self._link.channel()
                await channel.queue_delete(self._ear, timeout=RPC_TIMEOUT_S)

    async def _listen(self, channel: Channel) -> None:
        for tier in self._tiers:
            await self._link.stand(tier)
        with mapped():
            self._ear = queue = f"{CONTROL}.{uuid4().hex}"
            await channel.queue_declare(queue, exclusive=True, auto_delete=True, timeout=RPC_TIMEOUT_S)
            await channel.basic_consume(queue, self._hear, no_ack=True, timeout=RPC_TIMEOUT_S)
        # Last: who is called must be able to hear it.
        self._bound = False
        await self._be_there(channel)
        self.look()

    async def _be_there(self, channel: Channel) -> None:
        """Have calls come while messages are taken, and not while they are not."""
        takes = self._consumer.takes
        if self._ear is not None and takes != self._bound:
            change = channel.queue_bind if takes else channel.queue_unbind
            with mapped():
                await change(self._ear, CONTROL, f"{TIER}.{self._own}", timeout=RPC_TIMEOUT_S)
            self._bound = takes

    async def _hear(self, _: DeliveredMessage) -> None:
        self.look()

    async def _run(self) -> None:
        round_at = time.monotonic() + self._until_next_round()
        while not self._leaving:
            busy = False
            try:
                await self._be_there(await self._channel())
                busy = any([await self._serve(tier) for tier in (self._own, *self._adopted)])
                if time.monotonic() >= round_at and self._consumer.takes:
                    await self._look_round()
                    round_at = time.monotonic() + self._until_next_round()
            except Unpublished as error:
                _log.info("nobody can be called", reason=describe(error))
            except BrokerError as fault:
                _log.info("the queues of tiers are out of sight", reason=describe(fault))
                await self._let_go()
                await self._link.channel()
            except Exception:  # noqa: BLE001 - the comment says why
                # Others count on this task as long as calls come to it: it must outlive what nobody foresaw.
                _log.exception("the queues of tiers: unexpected error")
            await self._rest(LOOK_AGAIN_S if busy else min(LOOK_S, self._orphaned_s))

    async def _rest(self, seconds: float) -> None:
        """Wait for a call, but no longer than that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._called.wait()
        if not self._leaving:
            self._called.clear()

    def _until_next_round(self) -> float:
        """Not all workers at once."""
        return min(LOOK_ROUND_S, self._orphaned_s) * random.uniform(0.5, 1.5)  # noqa: S311 - spread, not secrecy

    async def _serve(self, tier: str) -> bool:
        """Take what waits for this tier. Tells whether there is something.

        With nothing left the consumers go at once, while what they brought is in hand: its place is then free for the
        producers' queue.
        """
        queue = tier_queue(tier)
        ready = await self._ready(queue)
        await self._consumer.serve(queue, ready and ready + self._consumer.held(queue))
        return ready > 0

    async def _let_go(self) -> None:
        """Keep no place for queues that may be empty."""
        for tier in (self._own, *self._adopted):
            await self._consumer.serve(tier_queue(tier), 0)

    async def _look_round(self) -> None:
        before, self._adopted = self._adopted, {tier for tier in self._others if await self._is_orphaned(tier)}
        for tier in before - self._adopted:
            await self._consumer.serve(tier_queue(tier), 0)
        for tier in self._adopted - before:
            _log.warning("no worker of that tier is there: its requests are taken here", tier=tier)
            await self._serve(tier)

    async def _is_orphaned(self, tier: str) -> bool:
        """Whether requests have long been waiting there, and nobody of that tier is there."""
        if not await self._ready(tier_queue(tier)) or await self._call(tier):
            self._waiting_since.pop(tier, None)
            return False
        since = self._waiting_since.setdefault(tier, time.monotonic())
        return time.monotonic() - since >= self._orphaned_s

    async def _ready(self, queue: str) -> int:
        channel = await self._channel()
        with mapped():
            found = await channel.queue_declare(queue, passive=True, timeout=RPC_TIMEOUT_S)
        return found.message_count or 0

    async def _channel(self) -> Channel:
        """Return the open channel. Raises ``ConnectionLost`` rather than wait, which would hold prefetch."""
        if not self._link.is_up:
            raise ConnectionLost("not connected")
        return await self._link.channel()
