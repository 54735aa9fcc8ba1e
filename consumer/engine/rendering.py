# SPDX-License-Identifier: Apache-2.0
"""The renderer process as the ``Renderer`` port."""

from pathlib import Path

from consumer.engine.messages import Listen, Render, RendererReport
from consumer.engine.supervisor import Supervisor
from consumer.job import Heard, Job, Plan, Rendering, Sources
from consumer.ports import Report


class RendererSupervisor(Supervisor[RendererReport]):
    """Has songs made in a child process; implements ``ports.Renderer``."""

    name = "renderer"
    module = "consumer.engine.renderer"
    report_type = RendererReport

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Render one job, again on a new process if the old one dies under it."""

        def order(number: int) -> Render:
            return Render(order=number, job=job, plan=plan, sources=sources, folder=folder)

        return await self.ask(job.task_id, order, Rendering, report)

    async def listen(self, job: Job, sources: Sources) -> Heard:
        """Turn the job's source audio into audio codes."""

        def order(number: int) -> Listen:
            return Listen(order=number, job=job, sources=sources)

        return await self.ask(job.task_id, order, Heard, lambda *_: None)
