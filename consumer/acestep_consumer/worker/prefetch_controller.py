# SPDX-License-Identifier: Apache-2.0
"""Controller of ``ACESTEP_QUEUE_WORKERS=auto``: samples the worker every few seconds and sets its prefetch.

The decision is in ``prefetch_policy``, which is pure; this is its clock and its I/O.
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
    """Holder of the prefetch: ``broker.consumer.Consumer``."""

    @property
    def finished(self) -> int:
        """Deliveries whose jobs have ended here so far."""

    async def set_prefetch(self, count: int) -> None:
        """Change the prefetch."""


class EngineProgress(Protocol):
    """Work and memory of the engine: ``engine.device_usage.DeviceUsage``."""

    @property
    def audio_s(self) -> float:
        """Seconds of audio finished so far; 0 from an engine that does not tell."""

    @property
    def reductions(self) -> int:
        """Times so far that memory made a pack smaller, or work wait."""

    @property
    def memory_share(self) -> float | None:
        """Memory in use as a share of the limit; None: not known."""


class PrefetchController:
    """Keeps the prefetch at the policy's value.

    Args:
        consumer: holder of the prefetch.
        engine: its engine's progress.
        policy: decides on the prefetch.
        wanted: returns how many more jobs the stages have work for; see ``WorkerSample``.
        on_change: called after every change.
    """

    def __init__(
        self,
        consumer: PrefetchHolder,
        engine: EngineProgress,
        policy: PrefetchPolicy,
        on_change: Callable[[], Awaitable[None]],
        wanted: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._consumer = consumer
        self._engine = engine
        self._policy = policy
        self._on_change = on_change
        self._wanted = wanted

    async def run(self) -> None:
        """Adjust the prefetch until cancelled. A step that fails is logged, and the next one is made all the same."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.step()
            except Exception:
                # Without this task the prefetch would stay where it is for good: it must survive any error.
                log.exception("prefetch not adjusted")

    async def step(self) -> None:
        """Sample once, and change the prefetch if the policy says so."""
        before = self._consumer.prefetch
        workers = self._policy.read(self._sample())
        if workers != before:
            log.info("prefetch changed", workers=workers, before=before, reason=self._policy.reason)
            await self._consumer.set_prefetch(workers)
            await self._on_change()

    def _sample(self) -> WorkerSample:
        finished = self._consumer.finished
        return WorkerSample(
            now_s=time.monotonic(),
            finished=finished,
            work=self._engine.audio_s + JOB_S * finished,
            in_hand=self._consumer.in_hand,
            memory=self._engine.memory_share,
            reductions=self._engine.reductions,
            wanted=self._wanted(),
        )
