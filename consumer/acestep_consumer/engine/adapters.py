# SPDX-License-Identifier: Apache-2.0
"""The planner process as the ``Planner`` port: who needs the language model goes there, who does not goes on."""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from acestep_consumer.domain.job import Job, Plan, Rendering, Sources, TokenizedSource
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.messages import (
    Configure,
    PlannerReport,
    PlanSongs,
    Render,
    RendererReport,
    SetMemoryShare,
    TokenizeAudio,
)
from acestep_consumer.engine.planner.direct import DirectPlanner
from acestep_consumer.engine.supervisor import Supervisor


class AudioTokenizer(Protocol):
    """Turns audio into audio codes; the renderer does."""

    async def listen(self, job: Job, sources: Sources) -> TokenizedSource:
        """Return the source audio's codes."""


class PlannerSupervisor(Supervisor[PlannerReport]):
    """Has plans written in a child process."""

    name = "planner"
    module = "acestep_consumer.engine.planner"
    report_type = PlannerReport

    async def think(self, job: Job, heard: TokenizedSource | None, report: Report) -> Plan:
        """Write one plan, again on a new process if the old one dies under it."""

        def order(number: int) -> PlanSongs:
            return PlanSongs(order=number, job=job, heard=heard)

        return await self.ask(job.task_id, order, Plan, report, tries=job.tries)


class LmPlanner:
    """Implements ``ports.Planner`` with a language model for the jobs that admission gave one."""

    def __init__(self, planner: PlannerSupervisor, listener: AudioTokenizer) -> None:
        self._planner = planner
        self._listener = listener
        self._direct = DirectPlanner()

    async def plan(self, job: Job, sources: Sources, report: Report) -> Plan:
        """Return the plan: the request's own, or the language model's."""
        if job.lm is None:
            return await self._direct.plan(job, sources, report)
        heard = await self._listener.listen(job, sources) if job.request.full_analysis_only else None
        return await self._planner.think(job, heard, report)


class RendererSupervisor(Supervisor[RendererReport]):
    """Has songs made in a child process; implements ``ports.Renderer``."""

    name = "renderer"
    module = "acestep_consumer.engine.renderer"
    report_type = RendererReport

    def allot(self, memory_gb: float) -> None:
        """Tell this process, and each that takes its place, how much of the device is its own."""
        assert isinstance(self._configure, Configure)  # noqa: S101 - the renderer's first message
        self._configure = replace(self._configure, memory_gb=memory_gb)
        self._send(SetMemoryShare(memory_gb=memory_gb))

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Render one job, again on a new process if the old one dies under it."""

        def order(number: int) -> Render:
            return Render(order=number, job=job, plan=plan, sources=sources, folder=folder)

        return await self.ask(job.task_id, order, Rendering, report, tries=job.tries)

    async def listen(self, job: Job, sources: Sources) -> TokenizedSource:
        """Turn the job's source audio into audio codes."""

        def order(number: int) -> TokenizeAudio:
            return TokenizeAudio(order=number, job=job, sources=sources)

        return await self.ask(job.task_id, order, TokenizedSource, lambda *_: None, tries=job.tries)
