# SPDX-License-Identifier: Apache-2.0
"""Readiness of a worker: from what it knows, and not before it consumes."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from acestep_consumer.config.settings import load
from acestep_consumer.observability.job_stats import JobStats, Refusals
from acestep_consumer.worker.readiness import WorkerState


@dataclass
class Part:
    """Stands in for any part of a worker; everything is fine with it."""

    is_up: bool = True
    away: bool = False
    ready: bool = True
    started: bool = True
    full: bool = False


@dataclass
class Parts:
    """The parts that the checks read."""

    connection: Part = field(default_factory=Part)
    outage: Part = field(default_factory=Part)
    engines: Part = field(default_factory=Part)
    store: Part | None = field(default_factory=Part)
    disk: Part | None = field(default_factory=Part)
    consumer: Part | None = field(default_factory=Part)

    def known(self) -> dict[str, bool]:
        parts: dict[str, Any] = {
            "engines": self.engines,
            "connections": [self.connection],
            "outage": self.outage,
            "store": self.store,
            "disk": self.disk,
            "consumer": self.consumer,
        }
        settings = load({}, env_file=None)
        return WorkerState(settings=settings, jobs=JobStats(), refusals=Refusals(), **parts).known()


def test_a_worker_that_consumes_with_everything_there_is_ready() -> None:
    assert Parts().known() == {"broker": True, "storage": True, "models": True, "disk": True}


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        (Parts(consumer=Part(started=False)), "broker"),
        (Parts(consumer=None), "broker"),
        (Parts(connection=Part(is_up=False)), "broker"),
        (Parts(store=None), "storage"),
        (Parts(outage=Part(away=True)), "storage"),
        (Parts(engines=Part(ready=False)), "models"),
        (Parts(disk=None), "disk"),
        (Parts(disk=Part(full=True)), "disk"),
    ],
)
def test_a_worker_is_not_ready_before_it_consumes_nor_without_a_part(parts: Parts, missing: str) -> None:
    assert [name for name, holds in parts.known().items() if not holds] == [missing]
