# SPDX-License-Identifier: Apache-2.0
"""How a job ended: the terminal event, and what becomes of its delivery. Pure."""

from dataclasses import dataclass
from datetime import datetime

from acestep_consumer.domain.audio_codes import parse_codes
from acestep_consumer.domain.errors import ConsumerError, PreviousOutcome, Verdict, WorkerLost
from acestep_consumer.domain.job import Job, Plan, Rendering, StoredObject
from acestep_schemas.events import (
    Audio,
    Completed,
    ErrorCode,
    ErrorReport,
    JobCompleted,
    TerminalEvent,
    Timings,
    Unfinished,
    unfinished_event,
)

Ending = Completed | Unfinished


@dataclass(frozen=True, slots=True)
class TerminalRecord:
    """The record of it. ``message`` is the fingerprint of the message that it answers; None: not known.

    ``traceparent`` is the trace that the work belonged to: an event that is told again belongs to it as well.
    """

    ending: Ending
    message: str | None = None
    traceparent: str | None = None

    def answers(self, message: str, *, same: bool) -> bool:
        """Whether this is how ``message`` ended.

        Songs answer every message that asks for their task. An end without songs answers the one message that came to
        it: whoever sends a failed task anew wants another try. ``same`` says that an equal fingerprint can only be
        that one message come again.
        """
        return isinstance(self.ending, Completed) or (same and self.message == message)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a message: ``event`` is None when nothing may be said; ``error`` says why it is a dead letter."""

    event: TerminalEvent | None
    verdict: Verdict
    error: ConsumerError | None = None


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Who worked on the message, on which attempt, and when it ended."""

    worker_id: str
    attempt: int
    now: datetime


def manifest(  # noqa: PLR0913, PLR0917 - it gathers what every stage returned, once
    job: Job, plan: Plan, rendering: Rendering, objects: tuple[StoredObject, ...], timings: Timings, scene: RunInfo
) -> Completed:
    """Write down a finished job: what was asked, what was done, and where the songs are."""
    request = job.request.model_copy(update={"audio_duration": plan.metas.duration or job.request.audio_duration})
    sung_s = rendering.tracks[0].duration_s if rendering.tracks else plan.metas.duration
    policy = job.policy.model_copy(update={"adjustments": (*job.policy.adjustments, *rendering.adjustments)})
    return Completed(
        task_id=job.task_id,
        attempt=scene.attempt,
        worker_id=scene.worker_id,
        finished_at=scene.now,
        model=job.model,
        lm=job.lm,
        policy=policy,
        audios=tuple(map(_audio, objects)),
        request=request,
        metas=plan.metas.model_copy(update={"duration": sung_s}),
        timings=timings,
        audio_codes=tuple(map(parse_codes, plan.audio_codes)),
        warnings=(*job.warnings, *plan.warnings, *rendering.warnings),
    )


def unfinished(error: ConsumerError, job: Job | None, task_id: str, scene: RunInfo) -> Unfinished:
    """Write down why a task ended without songs."""
    attempt = error.tries if isinstance(error, WorkerLost) else scene.attempt
    return Unfinished(
        task_id=task_id,
        status=error.status or "failed",
        attempt=attempt,
        worker_id=scene.worker_id,
        finished_at=scene.now,
        error=_report(error, attempt),
        policy=job.policy if job else None,
        warnings=job.warnings if job else (),
    )


def told(kept: TerminalRecord) -> Outcome:
    """Turn an end into its event. The same end gives the same event, whoever publishes it."""
    ending, trace = kept.ending, {"traceparent": kept.traceparent}
    if isinstance(ending, Completed):
        return Outcome(JobCompleted.of(ending).model_copy(update=trace), Verdict.ACK)
    verdict = Verdict.ACK if ending.status == "cancelled" else Verdict.DEAD_LETTER
    event = unfinished_event(ending).model_copy(update=trace)
    return Outcome(event, verdict, PreviousOutcome(ending.error.code, ending.error.message, ending.error.attempts))


def untold(error: ConsumerError) -> Outcome:
    """Make the outcome of which nobody hears: the message goes back, or nobody could tell whose it is."""
    return Outcome(None, error.verdict, error)


def known(error: object) -> ConsumerError:
    """Return the error itself if it is one of ours; anything else is a bug, and its text stays in the log."""
    if isinstance(error, ConsumerError):
        return error
    return ConsumerError(f"internal error ({type(error).__name__}); the worker's log has the details")


def _report(error: ConsumerError, attempts: int) -> ErrorReport:
    return ErrorReport(
        code=ErrorCode(error.code),
        message=str(error),
        retryable=error.retryable,
        attempts=attempts,
        details=error.details,
    )


def _audio(stored: StoredObject) -> Audio:
    track = stored.track
    return Audio(
        uri=stored.uri,
        url=stored.url,
        format=track.format,
        content_type=track.content_type,
        sample_rate=track.sample_rate,
        channels=track.channels,
        duration_s=track.duration_s,
        bytes=stored.bytes,
        sha256=stored.sha256,
        seed=track.seed,
    )
