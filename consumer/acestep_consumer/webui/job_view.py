# SPDX-License-Identifier: Apache-2.0
"""One job as the page shows it, and how each event changes that. Pure."""

import re
from datetime import datetime
from pathlib import PurePosixPath
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from acestep_consumer.audio.formats import FORMATS
from acestep_schemas.events import (
    Adjustment,
    Audio,
    Completed,
    ErrorReport,
    JobCompleted,
    JobEvent,
    JobProgress,
    JobStarted,
    LmChoice,
    Metas,
    ModelChoice,
    Timings,
    Unfinished,
)
from acestep_schemas.request import GenerationRequest

State = Literal["waiting", "running", "completed", "failed", "rejected", "cancelled", "expired"]

# The id is shown elsewhere, the seeds say whether they are random, and nobody reads a quarter of a megabyte of codes.
_LEFT_OUT: Final = {"task_id", "use_random_seed", "audio_code_string"}
_AS_IT_IS: Final = "application/octet-stream"
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.-]")


class SongView(BaseModel):
    """A song as the page needs it. ``seed`` is text: JavaScript rounds numbers above 2^53."""

    model_config = ConfigDict(frozen=True)

    name: str
    format: str
    content_type: str
    duration_s: float
    sample_rate: int
    channels: int
    bytes: int
    seed: str


class JobView(BaseModel):
    """What is known of one job. ``number`` counts jobs as they came up, ``heard`` is our clock at the last news.

    ``unsure``: it was submitted from here, and whether the broker took it is not known.

    ``audios`` stays here: where the songs lie is nothing that a browser has to know.
    """

    model_config = ConfigDict(frozen=True)

    task_id: str
    number: int
    since: datetime
    changed: datetime
    heard: datetime
    state: State = "waiting"
    stopping: bool = False
    unsure: bool = False
    request: dict[str, JsonValue] | None = None
    attempt: int = 0
    worker_id: str = ""
    model: ModelChoice | None = None
    lm: LmChoice | None = None
    progress: float = 0.0
    stage: str = ""
    remaining_s: float | None = None
    tier: str = ""
    adjustments: tuple[Adjustment, ...] = ()
    warnings: tuple[str, ...] = ()
    songs: tuple[SongView, ...] = ()
    metas: Metas | None = None
    timings: Timings | None = None
    error: ErrorReport | None = None
    audios: tuple[Audio, ...] = Field(default=(), exclude=True)

    @property
    def ended(self) -> bool:
        """Whether its terminal event is known."""
        return self.state not in ("waiting", "running")


def told(card: JobView, event: JobEvent, heard: datetime) -> JobView:
    """Return the card after an event; the same card when the event is late and says nothing new."""
    match event:
        case JobStarted():
            return card if _outlived(card, event) else _started(card, event, heard)
        case JobProgress():
            return card if card.ended else _progressed(card, event, heard)
        case JobCompleted(data=data):
            changes = _completed(data)
        case _:
            changes = _unfinished(event.data)
    over = {"changed": event.time, "heard": heard, "stopping": False, "unsure": False, "remaining_s": None}
    return card.model_copy(update=changes | over)


def request_shown(request: GenerationRequest) -> dict[str, JsonValue]:
    """Return the fields that say something: those that differ from their defaults."""
    shown: dict[str, JsonValue] = request.model_dump(mode="json", exclude_defaults=True, exclude=_LEFT_OUT)
    if request.seed:
        shown["seed"] = ", ".join(map(str, request.seed))
    return shown


def file_name(task_id: str, audio: Audio) -> str:
    """Return a name to save the song under; an event must not choose more than letters."""
    return _UNSAFE.sub("_", f"{task_id}-{PurePosixPath(audio.uri).name}")


def content_type_of(audio: Audio) -> str:
    """Return what the song is sent as. By our own table: an event's own type could make a browser run it."""
    return FORMATS[audio.format].content_type if audio.format in FORMATS else _AS_IT_IS


def _outlived(card: JobView, event: JobStarted) -> bool:
    """Whether the job has ended after this start; a later one means that the id was submitted again."""
    return card.ended and event.time <= card.changed


def _started(card: JobView, event: JobStarted, heard: datetime) -> JobView:
    again = JobView(
        task_id=card.task_id, number=card.number, since=card.since, changed=event.time, heard=heard,
        request=card.request, stopping=card.stopping and not card.ended,
    )  # fmt: skip
    data = event.data
    return again.model_copy(
        update={
            "state": "running",
            "attempt": data.attempt,
            "worker_id": data.worker_id,
            "model": data.model,
            "lm": data.lm,
            "tier": data.policy.tier,
            "adjustments": data.policy.adjustments,
            "remaining_s": data.expected_s,
        }
    )


def _progressed(card: JobView, event: JobProgress, heard: datetime) -> JobView:
    data = event.data
    changes = {"progress": data.progress, "stage": data.stage, "remaining_s": data.remaining_s}
    over = {"state": "running", "changed": event.time, "heard": heard, "unsure": False}
    return card.model_copy(update=changes | over)


def _completed(data: Completed) -> dict[str, object]:
    return {
        "state": "completed",
        "attempt": data.attempt,
        "worker_id": data.worker_id,
        "request": request_shown(data.request),
        "model": data.model,
        "lm": data.lm,
        "progress": 1.0,
        "tier": data.policy.tier,
        "adjustments": data.policy.adjustments,
        "warnings": data.warnings,
        "songs": tuple(_song(data.task_id, audio) for audio in data.audios),
        "audios": data.audios,
        "metas": data.metas,
        "timings": data.timings,
        "error": None,
    }


def _unfinished(data: Unfinished) -> dict[str, object]:
    return {
        "state": data.state,
        "attempt": data.attempt,
        "worker_id": data.worker_id,
        "adjustments": data.policy.adjustments if data.policy else (),
        "warnings": data.warnings,
        "error": data.error,
        "songs": (),
        "audios": (),
    }


def _song(task_id: str, audio: Audio) -> SongView:
    return SongView(
        name=file_name(task_id, audio),
        format=audio.format,
        content_type=content_type_of(audio),
        duration_s=audio.duration_s,
        sample_rate=audio.sample_rate,
        channels=audio.channels,
        bytes=audio.bytes,
        seed=str(audio.seed),
    )
