# SPDX-License-Identifier: Apache-2.0
"""Runs a job's stages inside everything that wraps a job.

From outside to inside: one run per task id, cancellation, the queue deadline, the songs that the request names, tier
forwarding, the attempt, admission, progress events, the scratch folder. An error in any of it becomes the job's ending.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import structlog

from acestep_consumer.concurrency.locks import KeyedLock
from acestep_consumer.concurrency.priority import rank_of
from acestep_consumer.domain.errors import Cancelled, ConsumerError, Expired, Interrupted
from acestep_consumer.domain.job import Job, Request
from acestep_consumer.domain.outcome import Ending, RunInfo, as_consumer_error, unfinished
from acestep_consumer.domain.parse import RequestRules
from acestep_consumer.domain.ports import Cancellations, Events, Report, Routes, SourceSongs, Store
from acestep_consumer.execution.cancel_scope import check_queue_deadline, deadline, unless_cancelled
from acestep_consumer.execution.context import JobContext
from acestep_consumer.execution.eta import CostModel
from acestep_consumer.execution.progress import ProgressReporter
from acestep_consumer.execution.retries import RetryPolicy
from acestep_consumer.execution.stage_limits import JobPlaces, StageLimits
from acestep_consumer.policy.admit import Limits, admit
from acestep_schemas.events import Completed, Unfinished

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRules:
    """Rules for every job of this worker; a reload of the settings replaces them.

    ``scratch`` makes a job's folder, by its task id, and removes it. ``tier_limits`` returns the limits of requests as
    the engines are now. ``execution_timeout_s``: None: no bound. ``stages`` has places for jobs in each stage.
    """

    worker_id: str
    scratch: Callable[[str], AbstractAsyncContextManager[Path]]
    tier_limits: Callable[[], Limits]
    request_rules: RequestRules
    execution_timeout_s: float | None
    stages: StageLimits = field(default_factory=StageLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRun:
    """One attempt at an admitted job, as its stages see it.

    Attributes:
        folder: the job's scratch folder, removed after the last stage.
        report: publishes progress of a stage.
        places: the job's places in the stages.
    """

    context: JobContext
    job: Job
    folder: Path
    report: Report
    places: JobPlaces


class JobRunner:
    """Runs the jobs of one worker, any number at a time.

    Args:
        retries: counts attempts and refuses those that are too many.
        cancellations: says when a job is to stop.
        routes: forwards requests that a larger tier should take.
        songs: finds the songs of earlier tasks that requests name.
        store: has the ends of tasks.
        events: publishes ``started`` and ``progress``.
        costs: estimates durations.
        rules: those of every job.
    """

    def __init__(  # noqa: PLR0913 - everything that wraps a job, once
        self,
        *,
        retries: RetryPolicy,
        cancellations: Cancellations,
        routes: Routes,
        songs: SourceSongs,
        store: Store,
        events: Events,
        costs: CostModel,
        rules: JobRules,
    ) -> None:
        self._retries = retries
        self._cancellations = cancellations
        self._routes = routes
        self._songs = songs
        self._store = store
        self._events = events
        self._costs = costs
        self.rules = rules
        self._tasks = KeyedLock()

    def exclusively(self, task_id: str) -> AbstractAsyncContextManager[None]:
        """Hold the task id: a second delivery of the same task waits."""
        return self._tasks.of(task_id)

    async def run(self, context: JobContext, task_id: str, stages: Callable[[JobRun], Awaitable[Completed]]) -> Ending:
        """Return what ``stages`` return, or the ending that their error means.

        Raises:
            Interrupted: the job has not ended; the message goes back to the queue, or another worker has it.
        """
        cancelled = self._cancellations.wait(task_id, context.delivery.sent)
        try:
            return await unless_cancelled(lambda: self._attempt(context, stages), cancelled)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - whatever broke, the producer gets a terminal event
            context.excused = context.attempt is not None and isinstance(error, Cancelled)
            ending = self.failure(error, context, task_id)
            if isinstance(error, Expired) and context.delivery.redelivered:
                await self.others_over(task_id, context.delivery.fingerprint, delivered=True)
            return ending

    def running_time(self) -> AbstractAsyncContextManager[None]:
        """Bound the body by the execution timeout. Raises ``ExecutionTimeout``.

        For the stages that compute. Waiting for storage or the broker is not running time: an outage has a bound of
        its own, and no job fails because of one.
        """
        return deadline(self.rules.execution_timeout_s)

    async def others_over(self, task_id: str, message: str, *, delivered: bool, with_songs: bool = False) -> bool:
        """Wait until no other worker is at a message that expired, or it has ended; a dead one is not waited for long.

        Whoever had it in time may go on without the broker, and its songs count. ``delivered``: somebody had it for
        certain. ``with_songs``: an end without songs is our own, and not waited for. Returns whether anybody may have
        been at it.
        """

        async def ended() -> bool:
            found = await self._store.find(task_id)
            if found is None or not found.answers(message, same=True):
                return False
            return not with_songs or isinstance(found.ending, Completed)

        return await self._retries.others_over(task_id, message, delivered=delivered, ended=ended)

    async def forget(self, task_id: str, message: str) -> None:
        """Remove the attempt records of a message that has ended."""
        await self._retries.forget(task_id, message)

    async def forget_attempts(self, context: JobContext, task_id: str) -> None:
        """Remove the attempt records of a message that has ended and is settled; most have none."""
        delivery = context.delivery
        if delivery.redelivered or delivery.expires or context.excused:
            await self.forget(task_id, delivery.fingerprint)

    def info(self, context: JobContext) -> RunInfo:
        """Return worker, attempt and the present moment, for an ending."""
        return RunInfo(self.rules.worker_id, context.attempt_number, datetime.now(UTC))

    def failure(self, error: Exception, context: JobContext, task_id: str) -> Unfinished:
        """Return the ending that ``error`` means, and log it: the text of a bug is for the log alone.

        Raises:
            Interrupted: the channel was lost. Another worker has the message then and may complete it, so that an end
                without songs would be a second one.
        """
        ours = as_consumer_error(error)
        if context.delivery.stale:
            log.warning("job not done; its message is redelivered", code=str(ours.code), reason=str(ours))
            raise Interrupted(f"its channel was lost: {ours}") from error
        if type(ours) is ConsumerError:
            log.error("job broke on a bug", exc_info=error)
        else:
            log.warning("job not done", code=str(ours.code), reason=str(ours))
        return unfinished(ours, context.job, task_id, self.info(context))

    async def _attempt(self, context: JobContext, stages: Callable[[JobRun], Awaitable[Completed]]) -> Completed:
        request, rules = check_queue_deadline(context.request, context.delivery), self.rules
        request = await self._songs.resolve(request)
        await self._routes.forward(request, context.delivery)
        async with self._retries.attempt(request.task_id, context.delivery) as context.attempt:
            await self._check_not_taken_back(request.task_id, context)
            context.job = job = self._admit(request, context)
            context.estimate = self._costs.expect(job)
            context.progress = progress = ProgressReporter(
                self._events, job, self.info(context), context.delivery.reply, context.estimate
            )
            with self._costs.running(context.estimate), progress:
                async with rules.scratch(job.task_id) as folder:
                    with rules.stages.job(job) as places:
                        run = JobRun(context=context, job=job, folder=folder, report=progress.report, places=places)
                        return await stages(run)

    async def _check_not_taken_back(self, task_id: str, context: JobContext) -> None:
        """Raise ``Interrupted`` where the broker took the message back before the attempt was recorded.

        It may have expired there, and another worker have said so. That one writes its record and then looks for
        attempts once more; we recorded ours, and look for its record: one of the two sees the other. The record that
        this job was begun in spite of is no sign of it.
        """
        delivery = context.delivery
        if delivery.stale:
            raise Interrupted("its channel was lost before the job began")
        if delivery.expires:
            found = await self._store.find(task_id)
            if found is not None and found != context.found and found.answers(delivery.fingerprint, same=True):
                raise Interrupted("another worker has ended it")

    def _admit(self, request: Request, context: JobContext) -> Job:
        tries = None if context.attempt is None else self._retries.remaining(context.attempt)
        job = admit(request, self.rules.tier_limits())
        return replace(
            job,
            tries=tries,
            traceparent=context.traceparent,
            message=context.delivery.fingerprint,
            rank=rank_of(context.delivery.priority),
            warnings=(*job.warnings, *context.warnings),
        )
