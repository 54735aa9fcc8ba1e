# SPDX-License-Identifier: Apache-2.0
"""The planner process as the ``Planner`` port: who needs the language model goes there, who does not goes on."""

from typing import Protocol

from acestep_consumer.engine.messages import PlannerReport, Think
from acestep_consumer.engine.planner.direct import DirectPlanner
from acestep_consumer.engine.supervisor import Supervisor
from acestep_consumer.job import Heard, Job, Plan, Sources
from acestep_consumer.ports import Report


class Listener(Protocol):
    """Turns audio into audio codes; the renderer does."""

    async def listen(self, job: Job, sources: Sources) -> Heard:
        """Return the source audio's codes."""


class PlannerSupervisor(Supervisor[PlannerReport]):
    """Has plans written in a child process."""

    name = "planner"
    module = "acestep_consumer.engine.planner"
    report_type = PlannerReport

    async def think(self, job: Job, heard: Heard | None, report: Report) -> Plan:
        """Write one plan, again on a new process if the old one dies under it."""

        def order(number: int) -> Think:
            return Think(order=number, job=job, heard=heard)

        return await self.ask(job.task_id, order, Plan, report, tries=job.tries)


class LmPlanner:
    """Implements ``ports.Planner`` with a language model for the jobs that admission gave one."""

    def __init__(self, planner: PlannerSupervisor, listener: Listener) -> None:
        self._planner = planner
        self._listener = listener
        self._direct = DirectPlanner()

    async def plan(self, job: Job, sources: Sources, report: Report) -> Plan:
        """Return the plan: the request's own, or the language model's."""
        if job.lm is None:
            return await self._direct.plan(job, sources, report)
        heard = await self._listener.listen(job, sources) if job.request.full_analysis_only else None
        return await self._planner.think(job, heard, report)
