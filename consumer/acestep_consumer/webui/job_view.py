# SPDX-License-Identifier: Apache-2.0
"""One job as the page shows it, and how each event updates that. Pure."""

import base64
import binascii
import math
import re
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.domain.audio_codes import parse_codes
from acestep_consumer.domain.job import LYRIC_TYPES
from acestep_consumer.webui.job_request import JobRequest, plain
from acestep_schemas.events import (
    MAX_PEAKS,
    Adjustment,
    Audio,
    Completed,
    Edit,
    ErrorReport,
    FileObject,
    JobCompleted,
    JobEvent,
    JobProgress,
    JobStarted,
    LmChoice,
    Metas,
    ModelChoice,
    ParentSong,
    Timings,
    Unfinished,
)
from acestep_schemas.request import GenerationRequest

_MAX_LINES: Final = 2_000
_T = TypeVar("_T")
State = Literal["waiting", "running", "completed", "failed", "rejected", "cancelled", "expired"]

# Types are known by name: what an event says of a type could make a browser run the file.
_UNKNOWN_TYPE: Final = "application/octet-stream"
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.-]")


Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class TokenView(BaseModel):
    """A word or a syllable of a line, and when it is sung, in seconds."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    text: Annotated[str, Field(max_length=1_000)]
    start_s: Seconds
    end_s: Seconds


class LineView(TokenView):
    """A line of lyrics and when it is sung. ``tokens`` are its parts; empty: only the line's own times are known."""

    tokens: Annotated[tuple[TokenView, ...], Field(max_length=500)] = ()


class CandidateView(BaseModel):
    """One of several songs that were made for a request, with its score. ``index``: its song's; None: not kept."""

    model_config = ConfigDict(frozen=True, from_attributes=True, coerce_numbers_to_str=True)

    seed: Annotated[str, Field(max_length=20)]
    score: float | None = None
    kept: bool = False
    index: int | None = None
    measures: Annotated[dict[str, float | None], Field(max_length=50)] = {}


class SongView(BaseModel):
    """A song as the page needs it.

    ``seed`` is text, because JavaScript rounds numbers above 2^53. ``peaks`` as in ``Audio``; empty: none. ``track`` is
    a stem's class. ``latents``: they are kept, so that a song made from this one starts from them. ``lyric_files`` are
    the kinds that there are.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    format: str
    content_type: str
    duration_s: float
    sample_rate: int
    channels: int
    bytes: int
    seed: str
    peaks: str = ""
    lyrics: tuple[LineView, ...] = ()
    lyric_score: float | None = None
    track: str = ""
    latents: bool = False
    lyric_files: tuple[str, ...] = ()


_LYRICS: Final = TypeAdapter(Annotated[tuple[LineView, ...], Field(max_length=_MAX_LINES)])
_CANDIDATES: Final = TypeAdapter(Annotated[tuple[CandidateView, ...], Field(max_length=64)])


class JobView(BaseModel):
    """State of one job, as far as it is known.

    Attributes:
        number: counts jobs in the order in which they were first seen.
        since: when it was submitted from the page, or else the time of its first event.
        changed: the time of its latest event.
        received: this server's clock when the latest event arrived.
        sending: it was submitted from the page, and the broker has not confirmed it yet.
        unsure: it was submitted from the page, and whether the broker accepted it is not known.
        codes: how many audio codes the request has.
        asked: the request itself; not sent to browsers, of which few read a quarter of a megabyte of codes.
        audios: not sent to browsers, which need not know where songs are stored.
    """

    model_config = ConfigDict(frozen=True)

    task_id: str
    number: int
    since: datetime
    changed: datetime
    received: datetime
    state: State = "waiting"
    stopping: bool = False
    sending: bool = False
    unsure: bool = False
    request: dict[str, JsonValue] | None = None
    codes: int = 0
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
    candidates: tuple[CandidateView, ...] = ()
    parents: tuple[ParentSong, ...] = ()
    edits: tuple[Edit, ...] = ()
    metas: Metas | None = None
    timings: Timings | None = None
    error: ErrorReport | None = None
    asked: GenerationRequest | None = Field(default=None, exclude=True)
    audios: tuple[Audio, ...] = Field(default=(), exclude=True)

    @property
    def job_request(self) -> JobRequest | None:
        """Its request with all that counts when it is sent again; None: not known."""
        return None if self.asked is None else JobRequest(self.asked, self.parents, self.edits)

    @property
    def ended(self) -> bool:
        """Whether its terminal event is known."""
        return self.state not in ("waiting", "running")


def updated(view: JobView, event: JobEvent, received: datetime) -> JobView:
    """Return the view after an event; the same view when the event is late and changes nothing."""
    match event:
        case JobStarted():
            return view if _is_outdated(view, event) else _started(view, event, received)
        case JobProgress():
            return view if view.ended else _progressed(view, event, received)
        case JobCompleted(data=data):
            view, changes = with_request(view, data.request), _completed(data)
        case _:
            changes = _unfinished(event.data)
    bookkeeping = {"changed": event.time, "received": received, "remaining_s": None}
    settled = {"stopping": False, "sending": False, "unsure": False}
    return view.model_copy(update=changes | bookkeeping | settled)


def with_request(view: JobView, request: GenerationRequest) -> JobView:
    """Return the view with a request: its fields that differ from their defaults, and the number of its codes."""
    shown = plain(request)
    codes = len(parse_codes(str(shown.pop("audio_code_string", ""))))
    return view.model_copy(update={"request": shown, "codes": codes, "asked": request})


def file_name(task_id: str, file: Audio | FileObject) -> str:
    """Return a file name to save it under, without characters that an event could misuse."""
    return _UNSAFE.sub("_", f"{task_id}-{PurePosixPath(file.uri).name}")


def content_type_of(file: Audio | FileObject) -> str:
    """Return the media type of a song by its format, and of lyrics by their name."""
    if isinstance(file, FileObject):
        return LYRIC_TYPES.get(PurePosixPath(file.uri).suffix[1:], _UNKNOWN_TYPE)
    return FORMATS[file.format].content_type if file.format in FORMATS else _UNKNOWN_TYPE


def _is_outdated(view: JobView, event: JobStarted) -> bool:
    """Whether the job has ended after this start; a later start means that the id was submitted again."""
    return view.ended and event.time <= view.changed


def _started(view: JobView, event: JobStarted, received: datetime) -> JobView:
    again = JobView(
        task_id=view.task_id, number=view.number, since=view.since, changed=event.time, received=received,
        request=view.request, codes=view.codes, asked=view.asked, stopping=view.stopping and not view.ended,
    )  # fmt: skip
    data = event.data
    # The words as they were submitted from this page are what its reader knows; a worker's are those of others.
    if view.asked is None and data.request is not None:
        again = with_request(again, data.request)
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


def _progressed(view: JobView, event: JobProgress, received: datetime) -> JobView:
    data = event.data
    changes = {"progress": data.progress, "stage": data.stage, "remaining_s": data.remaining_s}
    bookkeeping = {"state": "running", "changed": event.time, "received": received, "sending": False, "unsure": False}
    return view.model_copy(update=changes | bookkeeping)


def _completed(data: Completed) -> dict[str, object]:
    return {
        "state": "completed",
        "attempt": data.attempt,
        "worker_id": data.worker_id,
        "model": data.model,
        "lm": data.lm,
        "progress": 1.0,
        "tier": data.policy.tier,
        "adjustments": data.policy.adjustments,
        "warnings": data.warnings,
        "songs": tuple(_song(data.task_id, audio) for audio in data.audios),
        "audios": data.audios,
        "candidates": _bounded(_CANDIDATES, data.candidates),
        "parents": data.parents,
        "edits": data.edits,
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
        peaks=_peaks(audio.peaks or ""),
        lyrics=_bounded(_LYRICS, audio.lyrics),
        lyric_score=_finite(audio.lyric_score),
        track=(audio.track or "")[:100],
        latents=bool(audio.files and audio.files.latents),
        lyric_files=tuple(audio.lyric_files),
    )


def _bounded(adapter: TypeAdapter[tuple[_T, ...]], value: tuple[object, ...]) -> tuple[_T, ...]:
    """Return parts of an event as the page shows them; nothing where one of them is beyond its bounds."""
    try:
        return adapter.validate_python(value, from_attributes=True)
    except ValidationError:
        return ()


def _peaks(text: str) -> str:
    """Return peaks that are Base64 of at most 400 bytes; an empty text for anything else."""
    try:
        return text if len(base64.b64decode(text, validate=True)) <= MAX_PEAKS else ""
    except (binascii.Error, ValueError):
        return ""


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
