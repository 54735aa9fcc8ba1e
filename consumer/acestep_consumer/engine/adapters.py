# SPDX-License-Identifier: Apache-2.0
"""The ``Planner`` and ``Renderer`` ports on engine processes; jobs that need no language model are planned here."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from acestep_consumer.domain.job import Job, Plan, Rendering, Sources, TokenizedSource
from acestep_consumer.domain.ports import Renderer, Report
from acestep_consumer.engine.messages import (
    Configure,
    ConfigurePlanner,
    DeviceFound,
    FromEngine,
    LoadModels,
    PlannerReport,
    PlanSongs,
    Render,
    RendererReport,
    SetMemoryShare,
    TokenizeAudio,
)
from acestep_consumer.engine.supervisor import Supervisor
from acestep_consumer.policy.tiers import DEFAULT_DURATION_S
from acestep_schemas.events import Metas

log = structlog.get_logger()


class PlannerSupervisor(Supervisor[ConfigurePlanner, PlannerReport]):
    """Plans jobs in a child process that holds the language model."""

    name = "planner"
    module = "acestep_consumer.engine.planner"
    report_type = PlannerReport
    _renderer_is_up = False

    def configure(self, configure: ConfigurePlanner) -> None:
        """Replace the settings, where those that the process was started with were provisional."""
        self._configure = configure

    def load(self) -> None:
        """Let a process that was told to wait load its model, and those that replace it load without waiting."""
        self._configure = replace(self._configure, wait=False)
        self._send(LoadModels(configure=self._configure))

    def _on_failed_start(self) -> None:
        """Start the next process after the renderer: beside it, this one may have found too little memory."""
        if self._configure.beside:
            log.warning("the language model could not load beside the renderer; it is loaded after it")
            self._configure = replace(self._configure, beside=False, wait=not self._renderer_is_up)

    def renderer_is_up(self) -> None:
        """The renderer has measured its memory: a process that waits for it loads now."""
        self._renderer_is_up = True
        if self._configure.wait:
            self.load()

    async def plan_songs(self, job: Job, source: TokenizedSource | None, report: Report) -> Plan:
        """Plan one job; ``source`` is the tokenized source audio, for analysis."""

        def message_for(request_id: int) -> PlanSongs:
            return PlanSongs(request_id=request_id, job=job, source=source)

        return await self.ask(job.task_id, message_for, Plan, report, tries=job.tries)


class DirectPlanner:
    """Implements the ``Planner`` port. Admission has already refused requests that need the language model."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    async def plan(self, job: Job, sources: Sources, report: Report) -> Plan:  # noqa: ARG002 - the port's shape
        """Return the request's own metadata and codes, or the codes of the source audio where only these are asked."""
        if not job.request.extract_codes_only:
            return self._plan(job, _duration(job), job.request.audio_code_string)
        source = await self._renderer.tokenize_audio(job, sources)
        return self._plan(job, source.source_s, source.codes)

    @staticmethod
    def _plan(job: Job, duration: float | None, codes: str) -> Plan:
        request = job.request
        metas = Metas(
            bpm=request.bpm,
            duration=duration,
            keyscale=request.key_scale or "",
            timesignature=request.time_signature or "",
            language=request.vocal_language,
            caption=request.prompt,
            lyrics=request.lyrics,
        )
        return Plan(metas=metas, audio_codes=(codes,) if codes else ())


class LmPlanner:
    """Implements ``ports.Planner`` with a language model, for the jobs that admission assigned one to."""

    def __init__(self, planner: PlannerSupervisor, renderer: Renderer) -> None:
        self._planner = planner
        self._renderer = renderer
        self._direct = DirectPlanner(renderer)

    async def plan(self, job: Job, sources: Sources, report: Report) -> Plan:
        """Return the plan: the request's own values, or the language model's."""
        if job.lm is None:
            return await self._direct.plan(job, sources, report)
        source = await self._renderer.tokenize_audio(job, sources) if job.request.full_analysis_only else None
        return await self._planner.plan_songs(job, source, report)


class RendererSupervisor(Supervisor[Configure, RendererReport]):
    """Renders jobs in a child process; implements ``ports.Renderer``."""

    name = "renderer"
    module = "acestep_consumer.engine.renderer"
    report_type = RendererReport
    on_device: Callable[[DeviceFound], None] = staticmethod(lambda _: None)
    """Called when a process has found its device, long before it has loaded the models."""

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, DeviceFound):
            self.on_device(message)
        else:
            super()._handle(message)

    def set_memory_share(self, memory_gb: float) -> None:
        """Set the GiB of the device that this process, and each that replaces it, may use."""
        self._configure = replace(self._configure, memory_gb=memory_gb)
        self._send(SetMemoryShare(memory_gb=memory_gb))

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Render the songs of one job into ``folder``."""

        def message_for(request_id: int) -> Render:
            return Render(request_id=request_id, job=job, plan=plan, sources=sources, folder=folder)

        return await self.ask(job.task_id, message_for, Rendering, report, tries=job.tries)

    async def tokenize_audio(self, job: Job, sources: Sources) -> TokenizedSource:
        """Turn the job's source audio into audio codes."""

        def message_for(request_id: int) -> TokenizeAudio:
            return TokenizeAudio(request_id=request_id, job=job, sources=sources)

        return await self.ask(job.task_id, message_for, TokenizedSource, lambda *_: None, tries=job.tries)


def _duration(job: Job) -> float | None:
    """Return seconds; None when source audio or audio codes determine the duration."""
    request = job.request
    if request.audio_duration is not None or request.has_source or request.audio_code_string:
        return request.audio_duration
    return min(DEFAULT_DURATION_S, job.policy.limits.max_duration_s)
