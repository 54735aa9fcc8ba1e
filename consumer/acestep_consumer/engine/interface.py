# SPDX-License-Identifier: Apache-2.0
"""The engines as a worker uses them: what benchmarks and tests replace when they run without models."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from acestep_consumer.domain.ports import Planner, Renderer
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.engine.messages import RendererReport
from acestep_consumer.engine.supervisor import EngineState
from acestep_consumer.policy.admit import Limits


class EngineSet(Protocol):
    """A renderer and a planner that are started and stopped; ``engine.engines.Engines`` is the real one."""

    @property
    def ready(self) -> bool:
        """Whether orders are welcome."""

    @property
    def states(self) -> Mapping[str, EngineState]:
        """Of each engine process, by name, whether it takes orders and how often it was replaced."""

    @property
    def renderer(self) -> Renderer:
        """Makes the songs."""

    @property
    def planner(self) -> Planner:
        """Fills in what requests leave open."""

    @property
    def report(self) -> RendererReport:
        """What the renderer found. Only after ``start``."""

    @property
    def renderer_usage(self) -> DeviceUsage:
        """How the renderer's device is used."""

    def limits(self) -> Limits:
        """What may be asked of this worker now. Only after ``start``."""

    def warnings(self) -> Iterable[str]:
        """What the operator should know about this start."""

    async def start(self) -> None:
        """Bring them up. Raises ``EngineUnusable``."""

    async def stop(self) -> None:
        """End them."""

    async def wait_unusable(self) -> None:
        """Wait until one gives up for good. Raises ``EngineUnusable`` then."""
