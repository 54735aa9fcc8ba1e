# SPDX-License-Identifier: Apache-2.0
"""What a worker says of itself: its state as an event on the broker, and in the log what it is ready for."""

from typing import Literal

import structlog

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.domain.errors import Unpublished
from acestep_consumer.engine.interface import EngineSet
from acestep_consumer.execution.eta import CostModel
from acestep_schemas.events import Worker, WorkerEvent

log = structlog.get_logger()


class Announcements:
    """Says it as it is at that moment.

    Args:
        worker_id: whose announcements they are.
        publisher: publishes the events.
        link: the connection that the publisher uses.
        engines: what the worker can do. They have been started.
        consumer: what it has in hand.
        costs: what its latest jobs took.
    """

    def __init__(  # noqa: PLR0913 - an announcement has this many sources
        self,
        worker_id: str,
        publisher: Publisher,
        link: BrokerConnection,
        *,
        engines: EngineSet,
        consumer: Consumer,
        costs: CostModel,
    ) -> None:
        self._id = worker_id
        self._publisher = publisher
        self._link = link
        self._engines = engines
        self._consumer = consumer
        self._costs = costs

    async def ready(self) -> None:
        """Say what this worker takes. Waits for a broker that is away."""
        await self._publish("ready")

    async def leaving(self, state: Literal["draining", "stopped"]) -> None:
        """Say that this worker leaves, or has left; but leaving does not wait for a broker that is away."""
        if self._link.is_up:
            await self._publish(state)
        else:
            log.warning("announcement dropped", state=state, reason="the broker is away, and leaving does not wait")

    def log_ready(self, *, prefetch: int | str, after_s: float) -> None:
        """Write what came of the start into the log: device, limits and models.

        Args:
            prefetch: the number of jobs at once, or in words how it is found.
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
        )
        try:
            await self._publisher.announce(WorkerEvent.of(data))
        except Unpublished as error:
            log.warning("announcement dropped", state=state, reason=str(error))
