# SPDX-License-Identifier: Apache-2.0
"""Pipeline of one request: fetch, plan, render, upload, commit, publish, settle.

The order is the delivery guarantee: audio objects, then the manifest that commits them, then the confirmed terminal
event, then the ack. Whatever dies in between, the broker redelivers the message, and a redelivery that finds the
manifest repeats the event without rendering again. The outside is behind ports; what wraps a job is ``execution``.
"""

from dataclasses import dataclass

from acestep_consumer.domain.errors import Identified, Interrupted, StorageUnavailable, Unpublished
from acestep_consumer.domain.job import NO_SONGS, Plan, Rendering, Sources
from acestep_consumer.domain.outcome import (
    AUDIO_DELETED,
    Outcome,
    TerminalRecord,
    manifest,
    outcome_of,
    silent_outcome,
)
from acestep_consumer.domain.ports import Delivery, Events, Inputs, Planner, Renderer, Store
from acestep_consumer.execution.context import JobContext
from acestep_consumer.execution.runner import JobRun, JobRunner
from acestep_consumer.observability.job_stats import JobObserver
from acestep_consumer.observability.tracing import StageTimer, job_span
from acestep_schemas.events import Completed


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Ports that the stages call."""

    inputs: Inputs
    planner: Planner
    renderer: Renderer
    store: Store
    events: Events
    observer: JobObserver


async def _identified(delivery: Delivery) -> Outcome:
    """Give a message without any id one: only then can a redelivery be recognised as the same job."""
    try:
        await delivery.identify()
    except Unpublished as error:
        return silent_outcome(Interrupted(f"no id given: {error}"))
    return silent_outcome(Identified())


async def _rendered(renderer: Renderer, run: JobRun, plan: Plan, sources: Sources, stage: StageTimer) -> Rendering:
    """Render when the renderer has room; its reports tell the job's stage and place."""
    await run.places.render(plan)
    report = stage.rendering(run.places.rendering(run.report))
    return await renderer.render(run.job, plan, sources, run.folder, report)


class Pipeline:
    """Processes deliveries, any number at a time; two of one task id run one after the other."""

    def __init__(self, ports: Ports, runner: JobRunner) -> None:
        self._ports = ports
        self._runner = runner

    async def process(self, delivery: Delivery) -> None:
        """Process one delivery to its end: one terminal event, then its settlement.

        Raises:
            Unpublished: the event could not be confirmed; nothing is settled then, so the message comes back.
        """
        context = JobContext.of(delivery, self._runner.rules.request_rules)
        with job_span(context):
            outcome = await self._outcome_of(context)
            if context.progress is not None:
                await context.progress.finished()
            if outcome.event is not None:
                await self._ports.events.publish(outcome.event, delivery.reply)
                self._ports.observer.ended(context, outcome.event.data)
            await delivery.settle(outcome.verdict, outcome.error)
            if outcome.event is not None and context.task_id is not None:
                await self._runner.forget_attempts(context, context.task_id)

    async def _outcome_of(self, context: JobContext) -> Outcome:
        task_id = context.task_id
        if task_id is None:
            return await _identified(context.delivery)
        try:
            async with self._runner.exclusively(task_id):
                try:
                    return outcome_of(await self._record_of(context, task_id))
                except StorageUnavailable as error:  # no record can be written, but the producer gets its event
                    ending = self._runner.failure(error, context, task_id)
                    return outcome_of(TerminalRecord(ending, None, context.traceparent))
        except Interrupted as error:
            return silent_outcome(error)

    async def _record_of(self, context: JobContext, task_id: str) -> TerminalRecord:
        """Return the task's terminal record, written before anybody is told: after a crash it says the same."""
        store = self._ports.store
        context.found = await store.find(task_id)
        if context.answer is not None:
            if not await store.missing(context.answer):
                context.repeated = True
                return context.answer.for_body(context.body_hash)
            context.warnings = (AUDIO_DELETED,)
        ours = context.record(await self._runner.run(context, task_id, self._stages))
        return context.ended(ours, await store.commit(ours, context.found))

    async def _stages(self, run: JobRun) -> Completed:
        job, ports, stage, places = run.job, self._ports, StageTimer(self._ports.observer.running), run.places
        with stage("fetch"):
            sources = await ports.inputs.fetch(job, run.folder)
        async with self._runner.running_time():
            with stage("plan"):
                await places.plan()
                plan = await ports.planner.plan(job, sources, run.report)
            with stage("render"):
                rendering = NO_SONGS if job.analysis else await _rendered(ports.renderer, run, plan, sources, stage)
        with stage("upload"):
            await places.upload()
            objects = await ports.store.put(job, rendering)
        timings = stage.timings(rendering, run.context.delivery.queued_s)
        return manifest(job, plan, rendering, objects, timings, self._runner.info(run.context))
