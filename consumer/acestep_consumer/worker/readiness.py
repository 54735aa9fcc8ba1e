# SPDX-License-Identifier: Apache-2.0
"""Readiness checks and metrics of a worker while it starts, runs and stops."""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.config.settings import Settings
from acestep_consumer.domain.objects import Traffic
from acestep_consumer.engine.interface import EngineSet
from acestep_consumer.execution.stage_limits import StageLimits
from acestep_consumer.observability.http import Check
from acestep_consumer.observability.job_stats import JobStats, Refusals
from acestep_consumer.observability.metrics import (
    Metrics,
    engine_metrics,
    forwarding_metrics,
    process_metrics,
    readiness_metrics,
    renderer_metrics,
    scratch_metrics,
    stage_metrics,
    startup_metrics,
    storage_metrics,
    worker_metrics,
)
from acestep_consumer.storage.disk import DiskGuard
from acestep_consumer.storage.outage import OutageGate
from acestep_consumer.storage.results import ResultStore


@dataclass(slots=True, kw_only=True)
class WorkerState:
    """Parts of a worker that checks and metrics read. Those that the start creates are None until then.

    Attributes:
        settings: as they were at the start; nothing that can be reloaded is read.
        engines: the renderer and the planner.
        connections: the broker connections that jobs depend on.
        outage: says whether storage is unavailable; ``storage.outage.watch`` keeps that current while no job calls it.
        jobs: statistics of finished jobs.
        refusals: publishes that the broker did not confirm.
        traffic: bytes to and from S3.
        store: the result storage, once it was checked.
        disk: the disk of the scratch folder.
        consumer: the consumer of the request queue.
        stages: places of jobs in the stages.
        forwarded: requests forwarded to larger tiers, by tier; empty without tier routing.
    """

    settings: Settings
    engines: EngineSet
    connections: Collection[BrokerConnection]
    outage: OutageGate
    jobs: JobStats
    refusals: Refusals
    traffic: Traffic | None = None
    store: ResultStore | None = None
    disk: DiskGuard | None = None
    consumer: Consumer | None = None
    stages: StageLimits = field(default_factory=StageLimits)
    forwarded: Mapping[str, int] = field(default_factory=dict)

    def metrics(self) -> Metrics:
        """Return all metrics, complete from the first scrape on."""
        scratch = self.settings.engine.scratch_dir or Path(tempfile.gettempdir())
        return Metrics(
            lambda: worker_metrics(self.consumer, self.settings.broker.queue_maxsize),
            lambda: readiness_metrics(self.known()),
            self.jobs.collect,
            lambda: stage_metrics(self.jobs.running.jobs, self.stages.waiting, self.stages.limits),
            lambda: renderer_metrics(self.engines.renderer_usage),
            lambda: engine_metrics({name: state.restarts for name, state in self.engines.states.items()}),
            lambda: startup_metrics(self.engines.start_seconds),
            lambda: storage_metrics(self.traffic or Traffic(), away=self.outage.away),
            self.refusals.collect,
            lambda: scratch_metrics(scratch),
            lambda: forwarding_metrics(self.forwarded),
            process_metrics,
        )

    def checks(self) -> dict[str, Check]:
        """Return the readiness checks by name. None of them waits for anything."""
        return {
            "broker": self._consumes,
            "storage": self._storage_up,
            "models": lambda: self.engines.ready,
            "disk": lambda: self.disk is not None and not self.disk.full,
        }

    def known(self) -> dict[str, bool]:
        """Return what the checks find now."""
        return {name: check() for name, check in self.checks().items()}

    def engine_states(self) -> dict[str, dict[str, bool | int]]:
        """Return ``ready`` and ``restarts`` of each engine by name."""
        return {name: asdict(state) for name, state in self.engines.states.items()}

    def _consumes(self) -> bool:
        """Connected, and the consumer has been started: on a later channel it is started before the channel is used."""
        connected = all(connection.is_up for connection in self.connections)
        return connected and self.consumer is not None and self.consumer.started

    def _storage_up(self) -> bool:
        return self.store is not None and not self.outage.away
