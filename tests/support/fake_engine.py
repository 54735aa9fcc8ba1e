# SPDX-License-Identifier: Apache-2.0
"""An engine inside the test's own process: writes small real files, or does what the test tells it to."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from acestep_consumer.config.settings import LogLevel
from acestep_consumer.domain.job import Job, LoadedModel, Plan, Rendering, Sources, TokenizedSource
from acestep_consumer.domain.ports import Report
from acestep_consumer.domain.stages import EngineCapacity
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.engine.adapters import DirectPlanner
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.engine.messages import RendererReport, StartPhase
from acestep_consumer.engine.supervisor import EngineState
from acestep_consumer.policy.admit import Limits
from acestep_consumer.policy.tiers import BUILT_IN
from tests.support.engine_double import write_song

REPORT = RendererReport(
    device="cpu",
    device_name="none",
    vram_gb=24,
    models=(LoadedModel("acestep-v15-turbo", Variant.TURBO),),
    formats=("wav", "mp3"),
)


@dataclass
class FakeRenderer:
    """Counts what it renders. ``before`` runs first and may raise, wait, or look at the job."""

    before: Callable[[Job], Awaitable[None]] | None = None
    rendered: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Write one short wav per song."""
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.before is not None:
                await self.before(job)
            self.rendered.append(job.task_id)
            report(1.0, "render")
            tracks = tuple(write_song(folder / f"{i}.wav", seed) for i, seed in enumerate(job.seeds))
            return Rendering(tracks=tracks, render_s=0.01, encode_s=0.001)
        finally:
            self.at_once -= 1

    async def tokenize_audio(self, job: Job, sources: Sources) -> TokenizedSource:
        """Return five codes."""
        return TokenizedSource(codes="<|audio_code_1|>" * 5, source_s=1.0)


@dataclass
class FakeEngines:
    """A worker's engines inside the test's own process: that renderer, and no language model."""

    renderer: FakeRenderer = field(default_factory=FakeRenderer)
    report: RendererReport = REPORT
    ready: bool = True
    renderer_usage: DeviceUsage = field(default_factory=DeviceUsage)
    states: dict[str, EngineState] = field(default_factory=lambda: {"renderer": EngineState(ready=True, restarts=0)})
    start_seconds: dict[str, dict[StartPhase, float]] = field(default_factory=dict)

    @property
    def planner(self) -> DirectPlanner:
        """Plans without a language model."""
        return DirectPlanner(self.renderer)

    def capacity(self) -> EngineCapacity:
        """Anything at once."""
        return EngineCapacity()

    def limits(self) -> Limits:
        """Limits of the card that the report names."""
        return Limits(
            tier=BUILT_IN.tier_of(self.report.vram_gb),
            table_version=BUILT_IN.version,
            vram_gb=self.report.vram_gb,
            models=self.report.models,
            formats=frozenset(self.report.formats),
        )

    def set_log_level(self, level: LogLevel) -> None:
        """Log as the test does."""

    def warnings(self) -> tuple[str, ...]:
        """Nothing to say."""
        return ()

    async def start(self) -> None:
        """Be ready at once."""

    async def stop(self) -> None:
        """Nothing to end."""

    async def wait_unusable(self) -> None:
        """Never give up."""
        await asyncio.Event().wait()


class NoInputs:
    """An ``Inputs`` port for requests without audio."""

    async def fetch(self, job: Job, folder: Path) -> Sources:
        """Fetch nothing."""
        return Sources()
