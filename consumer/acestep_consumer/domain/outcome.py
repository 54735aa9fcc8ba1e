# SPDX-License-Identifier: Apache-2.0
"""Terminal record of a task, its event, and the settlement of its delivery. Pure."""

import json
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from acestep_consumer.domain.audio_codes import parse_codes
from acestep_consumer.domain.errors import ConsumerError, PreviousOutcome, Verdict, WorkerLost
from acestep_consumer.domain.job import Job, Plan, Rendering, StoredObject, StoredSideFile
from acestep_schemas.events import (
    Audio,
    Completed,
    ErrorCode,
    ErrorReport,
    FileObject,
    JobCompleted,
    SongFiles,
    TerminalEvent,
    Timings,
    Unfinished,
    unfinished_event,
)

Ending = Completed | Unfinished

OTHER_BODY: Final = (
    "this task had ended before, for a message with another body: the songs are those of that request. "
    "Use a new task_id for a new request"
)
AUDIO_DELETED: Final = "the audio of an earlier run of this task had been deleted: it was rendered again"


@dataclass(frozen=True, slots=True)
class TerminalRecord:
    """End of a task, as it is written to storage.

    Attributes:
        ending: data of the terminal event.
        message: fingerprint of the message that ended so; None: not known.
        body: SHA-256 of its body, hexadecimal; None: not known.
        traceparent: the trace that the job belonged to; a repeated event carries it again.
        data_json: the manifest of another version as it was read, which may say more than ``ending``; None: it says
            the same.
    """

    ending: Ending
    message: str | None = None
    traceparent: str | None = None
    body: str | None = None
    data_json: bytes | None = field(default=None, compare=False)

    def answers(self, message: str, *, same: bool) -> bool:
        """Whether this is the end of ``message``.

        A completed task answers every message with its id. A task that ended without songs answers only the message
        that ended so: a producer that publishes a failed task again wants another try. ``same`` says that an equal
        fingerprint can only be a redelivery of that message.

        There is one record a task, so that of two messages without songs only the latest is answered: if the ack of
        the other one was lost meanwhile, it is tried again and reported again, with the same event id. A record for
        each message would be one more object to read and write for every job, for the sake of that moment.
        """
        return isinstance(self.ending, Completed) or (same and self.message == message)

    def yields_to(self, other: "TerminalRecord", instead_of: "TerminalRecord | None" = None) -> bool:
        """Whether ``other``, which comes later, replaces this record.

        Never if it is the same message's: its end may have been told. A worker that was cut off while it made the songs
        yields to the one that ended the message meanwhile. Songs are never replaced by an error. ``instead_of`` is a
        record that ``other`` was made in place of: songs whose audio is gone yield to new songs.
        """
        replaced = self == instead_of
        if isinstance(self.ending, Completed):
            return replaced and isinstance(other.ending, Completed)
        return replaced or self.message != other.message

    def for_body(self, body: str) -> "TerminalRecord":
        """Return the record as the answer to a message with this body, with a warning if it was another one's."""
        if self.body in (None, body) or not isinstance(self.ending, Completed):
            return self
        warnings = (*self.ending.warnings, OTHER_BODY)
        data_json = self.data_json
        if data_json is not None:
            data_json = json.dumps({**json.loads(data_json), "warnings": warnings}, ensure_ascii=False).encode()
        return replace(self, ending=self.ending.model_copy(update={"warnings": warnings}), data_json=data_json)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Event to publish (None: none) and settlement of the delivery; ``error`` is the reason of a dead letter."""

    event: TerminalEvent | None
    verdict: Verdict
    error: ConsumerError | None = None


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Worker, attempt number and time of an ending."""

    worker_id: str
    attempt: int
    now: datetime


def manifest(  # noqa: PLR0913, PLR0917 - it gathers what every stage returned, once
    job: Job, plan: Plan, rendering: Rendering, objects: tuple[StoredObject, ...], timings: Timings, info: RunInfo
) -> Completed:
    """Build the manifest of a completed job."""
    found: dict[str, object] = {edit.field: edit.value for edit in rendering.edits}
    if found:
        found["extend_right_s"] = None
    duration = plan.metas.duration or job.request.audio_duration
    request = job.request.model_copy(update={"audio_duration": duration, **found})
    sung_s = rendering.tracks[0].duration_s if rendering.tracks else plan.metas.duration
    policy = job.policy.model_copy(update={"adjustments": (*job.policy.adjustments, *rendering.adjustments)})
    return Completed(
        task_id=job.task_id,
        attempt=info.attempt,
        worker_id=info.worker_id,
        finished_at=info.now,
        model=job.model,
        lm=job.lm,
        policy=policy,
        audios=tuple(map(_audio, objects)),
        request=request,
        metas=plan.metas.model_copy(update={"duration": sung_s}),
        timings=timings,
        audio_codes=tuple(map(parse_codes, _codes_of_kept(plan, rendering))),
        candidates=rendering.candidates,
        score_table=rendering.score_table,
        warnings=(*job.warnings, *plan.warnings, *rendering.warnings),
        parents=job.parents,
        edits=(*job.edits, *rendering.edits),
    )


def _codes_of_kept(plan: Plan, rendering: Rendering) -> tuple[str, ...]:
    """Return the audio codes of the songs that are kept, in their order."""
    if len(plan.audio_codes) != len(rendering.candidates):
        return plan.audio_codes  # each song is kept, or all were made from the same codes
    return tuple(plan.audio_codes[place] for place in rendering.kept)


def unfinished(error: ConsumerError, job: Job | None, task_id: str, info: RunInfo) -> Unfinished:
    """Build the data of a terminal event without songs."""
    attempt = error.tries if isinstance(error, WorkerLost) else info.attempt
    return Unfinished(
        task_id=task_id,
        status=error.status or "failed",
        attempt=attempt,
        worker_id=info.worker_id,
        finished_at=info.now,
        error=_report(error, attempt),
        policy=job.policy if job else None,
        warnings=job.warnings if job else (),
    )


def outcome_of(record: TerminalRecord) -> Outcome:
    """Return the event of a terminal record: the same record gives the same event, whoever publishes it."""
    ending = record.ending
    event: TerminalEvent = JobCompleted.of(ending) if isinstance(ending, Completed) else unfinished_event(ending)
    event = event.model_copy(update={"traceparent": record.traceparent})
    if record.data_json is not None:
        event = event.with_data_json(record.data_json)
    if isinstance(ending, Completed):
        return Outcome(event, Verdict.ACK)
    verdict = Verdict.ACK if ending.status == "cancelled" else Verdict.DEAD_LETTER
    return Outcome(event, verdict, PreviousOutcome(ending.error.code, ending.error.message, ending.error.attempts))


def silent_outcome(error: ConsumerError) -> Outcome:
    """Return the outcome without an event: the message is requeued, was forwarded, or has no readable id."""
    return Outcome(None, error.verdict, error)


def as_consumer_error(error: object) -> ConsumerError:
    """Return a ``ConsumerError`` unchanged. Anything else is a bug: its text stays in the log."""
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
        peaks=track.peaks or None,
        files=_song_files(stored.side_files),
        lyrics=track.lyrics,
        lyric_score=track.lyric_score,
        loudness=track.loudness,
        track=track.track,
    )


def _song_files(stored: tuple[StoredSideFile, ...]) -> SongFiles | None:
    if not stored:
        return None
    files = {
        file.kind: FileObject(
            uri=file.uri, url=file.url, content_type=file.content_type, bytes=file.bytes, sha256=file.sha256
        )
        for file in stored
    }
    return SongFiles(**files)
