# SPDX-License-Identifier: Apache-2.0
"""The interface of a worker's engines, so that benchmarks and tests can run without models."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from acestep_consumer.config.settings import LogLevel
from acestep_consumer.domain.ports import Planner, Renderer
from acestep_consumer.domain.stages import EngineCapacity
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.engine.messages import RendererReport, StartPhase
from acestep_consumer.engine.supervisor import EngineState
from acestep_consumer.policy.admit import Limits


class EngineSet(Protocol):
    """A renderer and a planner, started and stopped together; ``engine.engines.Engines`` is the real one."""

    @property
    def ready(self) -> bool:
        """Whether jobs are accepted."""

    @property
    def states(self) -> Mapping[str, EngineState]:
        """State of each engine process, by name."""

    @property
    def start_seconds(self) -> Mapping[str, Mapping[StartPhase, float]]:
        """Seconds of each part of the last start of each engine process, by its name."""

    @property
    def renderer(self) -> Renderer:
        """The port that renders songs."""

    @property
    def planner(self) -> Planner:
        """The port that plans songs."""

    @property
    def report(self) -> RendererReport:
        """The renderer's device, models and formats. Only after ``start``."""

    @property
    def renderer_usage(self) -> DeviceUsage:
        """Usage of the renderer's device."""

    def capacity(self) -> EngineCapacity:
        """Return what they can work on at once, as they know it now."""

    def limits(self) -> Limits:
        """Return the limits of requests to this worker now. Only after ``start``."""

    def set_log_level(self, level: LogLevel) -> None:
        """Set the minimum log level of the processes, also of later ones."""

    def warnings(self) -> Iterable[str]:
        """Return notes for the operator on this start."""

    async def start(self) -> None:
        """Start both. Raises ``EngineUnusable``."""

    async def stop(self) -> None:
        """Stop both."""

    async def wait_unusable(self) -> None:
        """Wait until one cannot be started any more. Raises ``EngineUnusable`` then."""
