# SPDX-License-Identifier: Apache-2.0
"""Controls the consumer: start, prefetch, pause, drain."""

import asyncio
from collections.abc import Callable

import structlog

from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.identified_queue import IdentifiedQueue
from acestep_consumer.broker.tier_queues import TierQueues
from acestep_consumer.config.settings import BrokerSettings
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.worker.announcements import Announcements
from acestep_consumer.worker.prefetch_controller import PrefetchController
from acestep_consumer.worker.prefetch_policy import PrefetchPolicy

ANSWER_S = 1.0
"""How long a worker without running jobs waits for the broker's answers before it leaves: those to its last events
among them. Nothing but these events can be lost by then."""

log = structlog.get_logger()


class Intake:
    """Starts, throttles and drains ``consumer``, and publishes the worker's state.

    Args:
        consumer: consumes the request queue.
        usage: usage of the GPU, for ``ACESTEP_QUEUE_WORKERS=auto``.
        announcements: publishes worker events.
        identified: consumes the requests that were given an id.
        tiers: consumes the tier queues as well, with tier routing.
        wanted: returns how many more jobs the stages have work for; None: the engines do not tell.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - it controls this many parts
        self,
        consumer: Consumer,
        usage: DeviceUsage,
        announcements: Announcements,
        identified: IdentifiedQueue,
        tiers: TierQueues | None = None,
        wanted: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._consumer = consumer
        self._identified = identified
        self._tiers = tiers
        self._wanted = wanted
        self._usage = usage
        self._announcements = announcements
        self._controlling: asyncio.Task[None] | None = None
        self._announcing: asyncio.Task[None] | None = None

    def control_prefetch(self, settings: BrokerSettings) -> None:
        """Tune the prefetch at run time, where ``ACESTEP_QUEUE_WORKERS`` is auto."""
        self._stop_controller()
        if settings.queue_workers is None:
            policy = PrefetchPolicy(settings.workers_at_start, settings.queue_workers_max)
            controller = PrefetchController(
                self._consumer, self._usage, policy, self._announcements.ready, self._wanted
            )
            self._controlling = asyncio.create_task(controller.run(), name="prefetch controller")

    async def change(self, settings: BrokerSettings) -> None:
        """Apply reloaded settings to the prefetch. Running jobs are not affected."""
        self.control_prefetch(settings)
        await self._consumer.set_prefetch(settings.workers_at_start)
        await self._announcements.ready()

    async def start(self) -> None:
        """Start consuming. Raises ``BrokerRefused``."""
        await self._consumer.start()
        self._identified.start()
        if self._tiers is not None:
            await self._tiers.start()

    async def pause(self, reason: str, *, on: bool) -> None:
        """Stop consuming for this reason; or, with ``on`` false, resume unless another reason is left."""
        await (self._consumer.pause(reason) if on else self._consumer.resume(reason))
        if self._tiers is not None:
            self._tiers.look()

    async def drain(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Stop consuming, and finish running jobs or requeue them.

        Args:
            grace_s: seconds that running jobs may take.
            hurry: set when they are to be requeued at once.

        Whatever the consumer raises is raised when the worker's end is announced. A broker that does not answer does
        not delay the jobs' end, nor the worker's by more than ``ANSWER_S``.
        """
        self._stop_controller()
        log.info("draining", jobs=self._consumer.in_hand, grace_s=grace_s)
        stopping = asyncio.create_task(self._stop_consuming(), name="stop consuming")
        await asyncio.sleep(0)  # it has begun: what is delivered from now on is requeued
        try:
            await self._finish_jobs(grace_s, hurry)
        finally:
            await self._announce_end(stopping)
        log.info("stopped")

    async def _stop_consuming(self) -> None:
        """Take nothing new from any queue, and announce it. The broker has to answer."""
        others = (self._identified, self._tiers) if self._tiers is not None else (self._identified,)
        await asyncio.gather(
            self._consumer.stop_consuming(),
            *(queue.stop() for queue in others),
            self._announcements.leaving("draining"),
        )

    async def _finish_jobs(self, grace_s: float, hurry: asyncio.Event) -> None:
        finishing = asyncio.create_task(self._consumer.finish(grace_s))
        hurrying = asyncio.create_task(hurry.wait())
        try:
            await asyncio.wait((finishing, hurrying), return_when=asyncio.FIRST_COMPLETED)
            if finishing.done():
                finishing.result()
            else:
                log.warning("stopping at once", requeued=self._consumer.in_hand)
                finishing.cancel()
                await self._consumer.finish(0)
        finally:
            hurrying.cancel()

    async def _announce_end(self, stopping: asyncio.Task[None]) -> None:
        """Announce that the worker has stopped, once ``stopping`` is done. No job is running any more."""

        async def announce() -> None:
            await stopping
            await self._announcements.leaving("stopped")

        self._announcing = asyncio.create_task(announce(), name="announce the end")
        # Not cancelled when it takes too long: aiormq would close the channel, and it would be opened again. It ends
        # with the connections.
        if (await asyncio.wait({self._announcing}, timeout=ANSWER_S))[0]:
            self._announcing.result()
        else:
            self._announcements.drop(f"the broker did not answer within {ANSWER_S:g} s")

    def _stop_controller(self) -> None:
        running, self._controlling = self._controlling, None
        if running is not None:
            running.cancel()
