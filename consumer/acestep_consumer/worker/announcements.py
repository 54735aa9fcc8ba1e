# SPDX-License-Identifier: Apache-2.0
"""Publishes worker.ready, worker.draining and worker.stopped events, and logs a summary once ready."""

from typing import Literal

import structlog

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.domain.errors import Unpublished
from acestep_consumer.engine.interface import EngineSet
from acestep_consumer.execution.eta import CostModel
from acestep_consumer.execution.stage_limits import StageLimits
from acestep_consumer.observability.tracing import StageCounts
from acestep_schemas.events import StageJobs, StageLimitsReport, Worker, WorkerEvent

log = structlog.get_logger()


class Announcements:
    """Publishes the worker's state as it is at that moment.

    Args:
        worker_id: id in the events.
        publisher: publishes the events.
        connection: the publisher's connection.
        engines: models and limits. They have been started.
        consumer: prefetch and running jobs.
        costs: mean duration of the latest jobs, and how long the running ones still take.
        running: running jobs by stage.
        stages: how many jobs each stage takes.
    """

    def __init__(  # noqa: PLR0913 - an announcement has this many sources
        self,
        worker_id: str,
        publisher: Publisher,
        connection: BrokerConnection,
        *,
        engines: EngineSet,
        consumer: Consumer,
        costs: CostModel,
        running: StageCounts,
        stages: StageLimits,
    ) -> None:
        self._id = worker_id
        self._publisher = publisher
        self._connection = connection
        self._engines = engines
        self._consumer = consumer
        self._costs = costs
        self._running = running
        self._stages = stages
        # Events of the worker's end that are neither confirmed nor dropped.
        self._left = {"draining", "stopped"}

    async def ready(self) -> None:
        """Publish worker.ready with models, tier and prefetch. Waits while the broker is unreachable."""
        await self._publish("ready")

    async def leaving(self, state: Literal["draining", "stopped"]) -> None:
        """Publish worker.draining or worker.stopped, unless the broker is unreachable: a stop does not wait for it."""
        if self._connection.is_up:
            await self._publish(state)
        else:
            log.warning("worker event dropped", state=state, reason="the broker is unreachable")
        self._left.discard(state)

    def drop(self, reason: str) -> None:
        """Log that those events of the worker's end that are left are not waited for any more."""
        for state in sorted(self._left):
            log.warning("worker event dropped", state=state, reason=reason)

    def log_ready(self, *, prefetch: int | str, after_s: float) -> None:
        """Log device, limits and models.

        Args:
            prefetch: the number, or how ``auto`` finds it.
            after_s: seconds since the start.
        """
        limits = self._engines.limits()
        log.info(
            "ready",
            worker=self._id,
            device=self._engines.report.device_name,
            vram_gb=round(limits.vram_gb, 1),
            tier=limits.tier.name,
            models=[model.name for model in limits.models],
            lm=f"{limits.lm.model} on {limits.lm.backend}" if limits.lm else None,
            prefetch=prefetch,
            after_s=round(after_s, 2),
        )

    async def _publish(self, state: Literal["ready", "draining", "stopped"]) -> None:
        limits = self._engines.limits()
        data = Worker(
            worker_id=self._id,
            state=state,
            prefetch=self._consumer.prefetch,
            models=tuple(model.name for model in limits.models),
            tier=limits.tier.name,
            vram_gb=limits.vram_gb,
            in_hand=self._consumer.in_hand,
            seconds_per_job=self._costs.seconds_per_job,
            remaining_s=tuple(None if each is None else round(each, 1) for each in self._costs.remaining_s),
            stages=StageJobs(**self._running.jobs),
            stage_limits=StageLimitsReport(**self._stages.limits),
            lm=limits.lm,
        )
        try:
            await self._publisher.announce(WorkerEvent.of(data))
        except Unpublished as error:
            log.warning("worker event dropped", state=state, reason=str(error))
