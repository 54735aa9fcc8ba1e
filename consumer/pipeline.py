# SPDX-License-Identifier: Apache-2.0
"""The story of one message, a line a stage. What it needs from outside are the ports; what it decides is pure.

Order is the guarantee: audio, then manifest, then the confirmed event, then the settlement. Whatever dies in between,
the message comes back, and a redelivery that finds the manifest repeats the event without rendering again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from consumer.deadline import deadline
from consumer.errors import ConsumerError
from consumer.job import Job, Plan, Rendering, Request, Sources
from consumer.narrator import Narrator
from consumer.outcome import Outcome, Scene, failed, known, manifest, succeeded
from consumer.policy.admit import Limits, admit
from consumer.ports import Delivery, Events, Inputs, Planner, Renderer, Report, Store
from consumer.scratch import scratch_folder
from consumer.stopwatch import Stopwatch
from consumer.turns import Turns
from consumer.validate import parse, readable_task_id
from schemas.events import Completed

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The outside, as the story sees it."""

    store: Store
    inputs: Inputs
    planner: Planner
    renderer: Renderer
    events: Events


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What bounds every job of this worker. ``limits`` is asked anew for each job: an engine may come back changed."""

    worker_id: str
    scratch: Path
    limits: Callable[[], Limits]
    max_message_bytes: int
    execution_timeout_s: float | None = None


class Pipeline:
    """Takes deliveries through the story, many at a time; two with one task id take turns."""

    def __init__(self, ports: Ports, rules: Rules) -> None:
        self._ports = ports
        self._rules = rules
        self._turns = Turns()

    async def process(self, delivery: Delivery) -> None:
        """Bring one message to its end. Raises ``Unpublished`` when nobody could be told: nothing is settled then."""
        outcome = await self._outcome_of(delivery)
        if outcome.event is not None:
            await self._ports.events.publish(outcome.event, delivery.reply)
        await delivery.settle(outcome.verdict, outcome.error)

    async def _outcome_of(self, delivery: Delivery) -> Outcome:
        request: Request | None = None
        job: Job | None = None
        try:
            request = parse(delivery.body, delivery.message_id, max_bytes=self._rules.max_message_bytes)
            async with self._turns.of(request.task_id):
                completed = await self._ports.store.find(request.task_id)
                if completed is None:
                    job = admit(request, self._rules.limits())
                    completed = await self._perform(job, delivery)
            return succeeded(completed)
        except Exception as error:  # noqa: BLE001 - whatever broke, the producer hears of it; cancellation passes
            return self._outcome_of_error(error, request, job, delivery)

    async def _perform(self, job: Job, delivery: Delivery) -> Completed:
        watch, ports = Stopwatch(), self._ports
        async with (
            deadline(self._rules.execution_timeout_s),
            Narrator(ports.events, job, self._scene(delivery), delivery.reply) as narrator,
        ):
            with scratch_folder(self._rules.scratch, job.task_id) as folder:
                sources = await ports.inputs.fetch(job, folder)
                with watch("plan"):
                    plan = await ports.planner.plan(job, sources, narrator.report)
                rendering = await self._render(job, plan, sources, folder, narrator.report)
                with watch("upload"):
                    objects = await ports.store.put(job, rendering)
                timings = watch.timings(rendering, delivery.queued_s)
                done = manifest(job, plan, rendering, objects, timings, self._scene(delivery))
                return await ports.store.commit(done)

    async def _render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        if job.analysis:
            return Rendering(tracks=(), render_s=0.0, encode_s=0.0)
        return await self._ports.renderer.render(job, plan, sources, folder, report)

    def _outcome_of_error(
        self, error: Exception, request: Request | None, job: Job | None, delivery: Delivery
    ) -> Outcome:
        ours = known(error)
        task_id = request.task_id if request else readable_task_id(delivery.body, delivery.message_id)
        if type(ours) is ConsumerError:
            log.error("job broke on a bug", task_id=task_id, exc_info=error)
        else:
            log.warning("job not done", task_id=task_id, code=str(ours.code), reason=str(ours))
        return failed(ours, job, task_id, self._scene(delivery))

    def _scene(self, delivery: Delivery) -> Scene:
        return Scene(self._rules.worker_id, delivery.attempt, datetime.now(UTC))
