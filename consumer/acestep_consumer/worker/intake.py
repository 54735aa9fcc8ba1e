# SPDX-License-Identifier: Apache-2.0
"""How much a worker takes: as many messages at once as its settings or its card say, in the end no more."""

import asyncio

import structlog

from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.tier_queues import TierQueues
from acestep_consumer.config.settings import BrokerSettings
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.worker.announcements import Announcements
from acestep_consumer.worker.prefetch_controller import PrefetchController
from acestep_consumer.worker.prefetch_policy import PrefetchPolicy

log = structlog.get_logger()


class Intake:
    """Starts, paces and drains ``consumer``, and announces it.

    Args:
        consumer: takes the messages.
        usage: tells how the card is used.
        announcements: says what becomes of it.
        tiers: has it take what smaller cards send on, where they do.
    """

    def __init__(
        self, consumer: Consumer, usage: DeviceUsage, announcements: Announcements, tiers: TierQueues | None = None
    ) -> None:
        self._consumer = consumer
        self._tiers = tiers
        self._usage = usage
        self._announcements = announcements
        self._pacing: asyncio.Task[None] | None = None

    def pace(self, settings: BrokerSettings) -> None:
        """Let the prefetch follow what the card can do, where the operator leaves it to us."""
        self._stop_pacing()
        if settings.queue_workers is None:
            policy = PrefetchPolicy(settings.workers_at_start, settings.queue_workers_max)
            pacer = PrefetchController(self._consumer, self._usage, policy, self._announcements.ready)
            self._pacing = asyncio.create_task(pacer.run(), name="pacer")

    async def change(self, settings: BrokerSettings) -> None:
        """Take as many as these settings say. Work in hand goes on."""
        self.pace(settings)
        await self._consumer.set_prefetch(settings.workers_at_start)
        await self._announcements.ready()

    async def start(self) -> None:
        """Take messages from now on. Raises ``BrokerRefused``."""
        await self._consumer.start()
        if self._tiers is not None:
            await self._tiers.start()

    async def hold(self, reason: str, *, on: bool) -> None:
        """Take nothing new for this reason; or, with ``on`` false, no longer hold back for it."""
        await (self._consumer.pause(reason) if on else self._consumer.resume(reason))
        if self._tiers is not None:
            self._tiers.look()

    async def drain(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Take nothing more, and end what is in hand or hand it back.

        Args:
            grace_s: seconds that work in hand may take.
            hurry: set when it may take none any more.
        """
        self._stop_pacing()
        if self._tiers is not None:
            await self._tiers.stop()
        log.info("draining", in_hand=self._consumer.in_hand, grace_s=grace_s)
        await self._announcements.leaving("draining")
        draining = asyncio.create_task(self._consumer.drain(grace_s))
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait((draining, hurrying), return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not draining.done():
            log.warning("leaving at once", handed_back=self._consumer.in_hand)
            draining.cancel()
            await self._consumer.drain(0)
        await self._announcements.leaving("stopped")
        log.info("stopped")

    def _stop_pacing(self) -> None:
        pacing, self._pacing = self._pacing, None
        if pacing is not None:
            pacing.cancel()
