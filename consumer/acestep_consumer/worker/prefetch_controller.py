# SPDX-License-Identifier: Apache-2.0
"""``ACESTEP_QUEUE_WORKERS=auto`` at work: reads the worker every few seconds and sets its prefetch as the policy says.

What to do is decided in ``acestep_consumer.worker.prefetch_policy``; here are only the clock, the eyes and the hand.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from acestep_consumer.observability.metrics import ConsumerState
from acestep_consumer.worker.prefetch_policy import PrefetchPolicy, WorkerSample

# Often enough to see memory run short before many more jobs are taken; a measurement has fifteen readings or more.
INTERVAL_S = 2.0
# Work is measured in seconds of audio, because jobs are long and short. A job counts as some besides, for those that
# make no audio, and for engines that do not tell.
JOB_S = 10.0

log = structlog.get_logger()


class PrefetchHolder(ConsumerState, Protocol):
    """A consumer whose prefetch is set: ``acestep_consumer.broker.consumer.Consumer``."""

    @property
    def finished(self) -> int:
        """Deliveries settled so far."""

    async def set_prefetch(self, count: int) -> None:
        """Let so many be in hand from now on."""


class EngineProgress(Protocol):
    """What the engine has done and how its memory is: ``acestep_consumer.engine.device_usage.DeviceUsage``."""

    @property
    def audio_s(self) -> float:
        """Seconds of audio finished so far; 0 from an engine that does not tell."""

    @property
    def squeezes(self) -> int:
        """Times so far that memory made a pack smaller, or work wait."""

    @property
    def memory_share(self) -> float | None:
        """Memory in use as a share of the limit; None: not known."""


class PrefetchController:
    """Keeps the prefetch at what the policy says.

    Args:
        consumer: whose prefetch it is.
        worked: what its engine tells.
        concurrency: the policy.
        on_change: told after every change.
    """

    def __init__(
        self,
        consumer: PrefetchHolder,
        worked: EngineProgress,
        concurrency: PrefetchPolicy,
        on_change: Callable[[], Awaitable[None]],
    ) -> None:
        self._consumer = consumer
        self._worked = worked
        self._concurrency = concurrency
        self._on_change = on_change

    async def run(self) -> None:
        """Work until cancelled. A step that fails is logged, and the next one is made all the same."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.step()
            except Exception:
                # The worker's speed is in this task's hands: it must outlive what nobody foresaw.
                log.exception("prefetch not adjusted")

    async def step(self) -> None:
        """Read once, and change the prefetch if that is the answer."""
        before = self._consumer.prefetch
        workers = self._concurrency.read(self._reading())
        if workers != before:
            log.info("prefetch", workers=workers, before=before, reason=self._concurrency.reason)
            await self._consumer.set_prefetch(workers)
            await self._on_change()

    def _reading(self) -> WorkerSample:
        finished = self._consumer.finished
        return WorkerSample(
            now_s=time.monotonic(),
            finished=finished,
            work=self._worked.audio_s + JOB_S * finished,
            in_hand=self._consumer.in_hand,
            memory=self._worked.memory_share,
            squeezes=self._worked.squeezes,
        )
