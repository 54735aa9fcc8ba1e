# SPDX-License-Identifier: Apache-2.0
"""What of a worker can be seen from outside while it starts, works and stops: its metrics, and whether it can work."""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.config.settings import Settings
from acestep_consumer.domain.objects import Traffic
from acestep_consumer.engine.interface import EngineSet
from acestep_consumer.observability.http import Check
from acestep_consumer.observability.job_stats import JobStats, Refusals
from acestep_consumer.observability.metrics import (
    EngineCollector,
    JobCollector,
    Metrics,
    PublisherCollector,
    ReadyCollector,
    RendererCollector,
    RoutingCollector,
    ScratchCollector,
    StorageCollector,
    WorkerCollector,
)
from acestep_consumer.storage.disk import DiskGuard
from acestep_consumer.storage.outage import OutageGate
from acestep_consumer.storage.results import ResultStore


@dataclass(slots=True, kw_only=True)
class WorkerState:
    """The parts that are looked at. Those that come with the start are None until then; who makes one enters it here.

    Attributes:
        settings: as they were at the start; nothing that can be reloaded is read.
        engines: the renderer and the planner.
        links: the connections to the broker that work depends on.
        patience: knows whether storage is away.
        jobs: the jobs that ended.
        refusals: the publishes that the broker did not confirm.
        traffic: the line to S3.
        store: the storage, from when it is first asked.
        disk: the disk under the scratch folder.
        consumer: takes the messages.
        sent_on: the requests that larger cards were given, by tier; empty where nothing is sent on.
    """

    settings: Settings
    engines: EngineSet
    links: Collection[BrokerConnection]
    patience: OutageGate
    jobs: JobStats
    refusals: Refusals
    traffic: Traffic | None = None
    store: ResultStore | None = None
    disk: DiskGuard | None = None
    consumer: Consumer | None = None
    sent_on: Mapping[str, int] = field(default_factory=dict)

    def metrics(self) -> Metrics:
        """Return what Prometheus reads, complete from the first moment."""
        scratch = self.settings.engine.scratch_dir or Path(tempfile.gettempdir())
        return Metrics(
            WorkerCollector(lambda: self.consumer, self.settings.broker.queue_maxsize),
            ReadyCollector(self.known),
            JobCollector(self.jobs),
            RendererCollector(lambda: self.engines.renderer_usage),
            EngineCollector(lambda: {name: state.restarts for name, state in self.engines.states.items()}),
            StorageCollector(lambda: self.traffic, lambda: self.patience.away),
            PublisherCollector(self.refusals),
            ScratchCollector(scratch),
            RoutingCollector(lambda: self.sent_on),
        )

    def checks(self) -> dict[str, Check]:
        """Return the conditions of readiness, by name. Storage is asked anew each time."""
        return {
            "broker": self._broker_up,
            "storage": self._storage_up,
            "models": self._models_up,
            "disk": self._room_on_disk,
        }

    def known(self) -> dict[str, bool]:
        """Return the same conditions as far as they are known without asking anybody: a scrape must not wait."""
        return {
            "broker": all(link.is_up for link in self.links) and self.consumer is not None,
            "storage": self.store is not None and not self.patience.away,
            "models": self.engines.ready,
            "disk": self.disk is not None and not self.disk.full,
        }

    def engine_states(self) -> dict[str, dict[str, bool | int]]:
        """Return of each engine, by name, whether it is ``ready`` and how many ``restarts`` it had."""
        return {name: asdict(state) for name, state in self.engines.states.items()}

    async def _broker_up(self) -> bool:
        return self.known()["broker"]

    async def _storage_up(self) -> bool:
        if self.store is None or self.patience.away:
            return False
        await self.store.ready()
        return True

    async def _models_up(self) -> bool:
        return self.known()["models"]

    async def _room_on_disk(self) -> bool:
        return self.known()["disk"]
