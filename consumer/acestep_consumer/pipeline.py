# SPDX-License-Identifier: Apache-2.0
"""The story of one message, a line a stage. What it needs from outside are the ports; what it decides is pure.

Order is the guarantee: audio, then manifest, then the confirmed event, then the settlement. Whatever dies in between,
the message comes back, and a redelivery that finds the manifest repeats the event without rendering again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from acestep_consumer.concurrency.locks import KeyedLock
from acestep_consumer.domain.errors import Interrupted, StorageUnavailable
from acestep_consumer.domain.job import NO_SONGS, Job
from acestep_consumer.domain.outcome import Outcome, TerminalRecord, known, manifest, told, untold
from acestep_consumer.domain.ports import (
    Cancellations,
    Delivery,
    Events,
    Inputs,
    Planner,
    Renderer,
    Report,
    Routes,
    Store,
)
from acestep_consumer.execution.cancel_scope import check_queue_deadline, deadline, unless_cancelled
from acestep_consumer.execution.context import JobContext, Witness
from acestep_consumer.execution.progress import ProgressReporter
from acestep_consumer.execution.retries import RetryPolicy
from acestep_consumer.execution.scratch import scratch_folder
from acestep_consumer.observability.job_stats import JobObserver
from acestep_consumer.observability.tracing import StageTimer, job_span
from acestep_consumer.policy.admit import Limits, admit
from acestep_schemas.events import Completed


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The outside, as the story sees it."""

    store: Store
    routes: Routes
    trials: RetryPolicy
    cancellations: Cancellations
    inputs: Inputs
    planner: Planner
    renderer: Renderer
    events: Events
    chronicle: JobObserver


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What bounds every job of this worker. What may change while it runs is asked anew for each job.

    ``execution_timeout_s`` returns seconds; None: no bound.
    """

    worker_id: str
    scratch: Path
    limits: Callable[[], Limits]
    max_message_bytes: int
    execution_timeout_s: Callable[[], float | None]


class Pipeline:
    """Takes deliveries through the story, many at a time; two with one task id take turns."""

    def __init__(self, ports: Ports, rules: Rules) -> None:
        self._ports = ports
        self._rules = rules
        self._turns = KeyedLock()
        self._witness = Witness(rules.worker_id)

    async def process(self, delivery: Delivery) -> None:
        """Bring one message to its end. Raises ``Unpublished`` when nobody could be told: nothing is settled then."""
        case = JobContext.of(delivery, self._rules.max_message_bytes)
        with job_span(case):
            outcome = await self._outcome_of(case)
            if outcome.event is not None:
                await self._ports.events.publish(outcome.event, delivery.reply)
                self._ports.chronicle.ended(case, outcome.event.data)
            await delivery.settle(outcome.verdict, outcome.error)

    async def _outcome_of(self, case: JobContext) -> Outcome:
        if case.task_id is None:
            return untold(known(case.read))
        try:
            async with self._turns.of(case.task_id):
                return told(await self._kept(case, case.task_id))
        except Interrupted as error:
            return untold(error)
        except StorageUnavailable as error:  # nothing can be written down there; the producer hears of it all the same
            return told(TerminalRecord(self._witness.without_songs(error, case, case.task_id), None, case.traceparent))

    async def _kept(self, case: JobContext, task_id: str) -> TerminalRecord:
        """Return how the task ended, as it is written down: what comes after a crash must say the same."""
        case.found = await self._ports.store.find(task_id)
        if case.answer is not None:
            return case.answer
        asked = self._ports.cancellations.wait(task_id, case.delivery.sent)
        work = unless_cancelled(lambda: self._perform(case), asked)
        ending = await self._witness.end_of(work, case, task_id)
        return await self._ports.store.commit(
            TerminalRecord(ending, case.delivery.fingerprint, case.traceparent), case.found
        )

    async def _perform(self, case: JobContext) -> Completed:
        request, trials = check_queue_deadline(case.request, case.delivery), self._ports.trials
        await self._ports.routes.send_on(request, case.delivery)
        async with trials.of(request.task_id, case.delivery) as case.attempt:
            tries, trace = trials.left(case.attempt), case.traceparent
            job = replace(admit(request, self._rules.limits()), tries=tries, traceparent=trace)
            estimate, scene = self._ports.chronicle.begins(case, job), self._witness.scene(case)
            async with (
                deadline(self._rules.execution_timeout_s()),
                ProgressReporter(self._ports.events, job, scene, case.delivery.reply, estimate) as narrator,
            ):
                with scratch_folder(self._rules.scratch, job.task_id) as folder:
                    return await self._make(job, case, folder, narrator.report)

    async def _make(self, job: Job, case: JobContext, folder: Path, report: Report) -> Completed:
        watch, ports = StageTimer(), self._ports
        with watch("fetch"):
            sources = await ports.inputs.fetch(job, folder)
        with watch("plan"):
            plan = await ports.planner.plan(job, sources, report)
        with watch("render"):
            render = ports.renderer.render
            rendering = NO_SONGS if job.analysis else await render(job, plan, sources, folder, report)
        with watch("upload"):
            objects = await ports.store.put(job, rendering)
        timings = watch.timings(rendering, case.delivery.queued_s)
        return manifest(job, plan, rendering, objects, timings, self._witness.scene(case))
