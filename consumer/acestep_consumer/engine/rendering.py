# SPDX-License-Identifier: Apache-2.0
"""The renderer process as the ``Renderer`` port."""

from dataclasses import replace
from pathlib import Path

from acestep_consumer.engine.messages import Allot, Configure, Listen, Render, RendererReport
from acestep_consumer.engine.supervisor import Supervisor
from acestep_consumer.job import Heard, Job, Plan, Rendering, Sources
from acestep_consumer.ports import Report


class RendererSupervisor(Supervisor[RendererReport]):
    """Has songs made in a child process; implements ``ports.Renderer``."""

    name = "renderer"
    module = "acestep_consumer.engine.renderer"
    report_type = RendererReport

    def allot(self, memory_gb: float) -> None:
        """Tell this process, and each that takes its place, how much of the device is its own."""
        assert isinstance(self._configure, Configure)  # noqa: S101 - the renderer's first message
        self._configure = replace(self._configure, memory_gb=memory_gb)
        self._send(Allot(memory_gb=memory_gb))

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Render one job, again on a new process if the old one dies under it."""

        def order(number: int) -> Render:
            return Render(order=number, job=job, plan=plan, sources=sources, folder=folder)

        return await self.ask(job.task_id, order, Rendering, report, tries=job.tries)

    async def listen(self, job: Job, sources: Sources) -> Heard:
        """Turn the job's source audio into audio codes."""

        def order(number: int) -> Listen:
            return Listen(order=number, job=job, sources=sources)

        return await self.ask(job.task_id, order, Heard, lambda *_: None, tries=job.tries)
