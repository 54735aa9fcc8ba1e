# SPDX-License-Identifier: Apache-2.0
"""Tasks as ACE-Step's clients see them: the entries of ``/query_result`` and the items in them. Pure.

Values that are unknown are the text "N/A", an entry's ``result`` is JSON text, and ``wave`` is always empty, as there.
Beyond that an item has ``url``, the same as ``file``, and the fields of ACE-Step's Gradio API at its top level.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal
from urllib.parse import quote

from acestep_consumer.domain.audio_codes import format_codes
from acestep_consumer.gateway.answers import dumps
from acestep_consumer.gateway.task_ids import accepted_at
from acestep_schemas.events import (
    Audio,
    Completed,
    Edit,
    FileObject,
    JobEvent,
    JobProgress,
    JobStarted,
    Metas,
    TerminalEvent,
    Timings,
    Unfinished,
)

QUEUED, SUCCEEDED, FAILED = 0, 1, 2
"""Statuses of an entry; a running task has that of a queued one."""

AUDIO_PATH: Final = "/v1/audio?path="

_UNKNOWN: Final = "N/A"
_ENV: Final = "development"

TaskStage = Literal["queued", "running", "succeeded", "failed"]

INPUTS: Final = frozenset({"src_audio_path", "reference_audio_path"})
"""Fields whose values are not shown: other clients' addresses, and those of uploads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """State of a task, as far as it is known.

    Attributes:
        task_id: its id.
        created: seconds since 1970.
        stage: where it is.
        progress: 0 to 1.
        detail: what a running task does, or why it failed; for people.
        items: of an ended task, as ``/query_result`` lists them.
        audios: its songs in storage.
        metas: the musical metadata of a task that succeeded.
        remaining_s: estimated seconds that are left; None: unknown.
    """

    task_id: str
    created: int
    stage: TaskStage = "queued"
    progress: float = 0.0
    detail: str = ""
    items: tuple[Mapping[str, Any], ...] = ()
    audios: tuple[Audio, ...] = ()
    metas: Metas | None = None
    remaining_s: float | None = None

    @property
    def ended(self) -> bool:
        """Whether it goes on no more."""
        return self.stage in ("succeeded", "failed")

    @property
    def status(self) -> int:
        """Its status as a number."""
        return {"succeeded": SUCCEEDED, "failed": FAILED}.get(self.stage, QUEUED)

    def result(self) -> tuple[Mapping[str, Any], ...]:
        """Return its items; a task that has not ended has one without a song."""
        return self.items or (_pending_item(self),)

    def entry(self) -> dict[str, Any]:
        """Return its entry in ``/query_result``."""
        return {
            "task_id": self.task_id,
            "result": dumps(self.result()),
            "status": self.status,
            "progress_text": self.detail,
        }


def unknown_entry(task_id: object) -> dict[str, Any]:
    """Return the entry of a task that was never accepted."""
    return {"task_id": task_id, "result": "[]", "status": QUEUED}


def updated_task(view: TaskView, event: JobEvent) -> TaskView:
    """Return the view after an event. An ended task stays ended."""
    match event:
        case JobStarted():
            return view if view.ended else replace(view, stage="running", progress=0.01, detail="running")
        case JobProgress(data=data):
            if view.ended:
                return view
            detail = f"{data.stage} {data.progress:.0%}"
            progress = max(0.01, data.progress)
            return replace(view, stage="running", progress=progress, detail=detail, remaining_s=data.remaining_s)
        case _:
            return ended_task(event, view.created)


def ended_task(event: TerminalEvent, created: int | None = None) -> TaskView:
    """Return the view of a task that ended with this event."""
    data, task_id = event.data, event.subject
    since = accepted_at(task_id) or created or int(data.finished_at.timestamp())
    if isinstance(data, Unfinished):
        return _failed(TaskView(task_id=task_id, created=since), data)
    view = TaskView(
        task_id=task_id, created=since, stage="succeeded", progress=1.0, audios=data.audios, metas=data.metas
    )
    return replace(view, items=_items(data, since), detail=_songs(len(data.audios)) if data.audios else "done")


def file_url(task_id: str, file: Audio | FileObject) -> str:
    """Return the address of a song, or of a file beside it: relative, its suffix at the very end, as clients expect."""
    name = file.uri.rpartition("/")[2]
    return AUDIO_PATH + quote(f"/{task_id}/{name}", safe="")


def _failed(view: TaskView, data: Unfinished) -> TaskView:
    text = f"{data.error.code}: {data.error.message}"
    failed = replace(view, stage="failed", detail=text)
    item = {**_pending_item(failed), "error": text, "code": str(data.error.code), "state": data.status}
    return replace(failed, items=(item,))


def _pending_item(view: TaskView) -> dict[str, Any]:
    item: dict[str, Any] = {
        "file": "",
        "wave": "",
        "status": view.status,
        "create_time": view.created,
        "env": _ENV,
        "progress": view.progress,
        "stage": view.stage,
        "error": None,
    }
    if view.stage == "queued":
        return item | {"prompt": "", "lyrics": "", "metas": {}}
    if view.stage == "running":
        return item | {"stage": view.detail or "running", "remaining_s": view.remaining_s}
    return item


def _items(data: Completed, created: int) -> tuple[Mapping[str, Any], ...]:
    shared = _shared(data, created)
    if data.request.extract_codes_only or data.request.full_analysis_only:
        return (_analysis(data),)
    if not data.audios:
        return (shared | {"file": "", "url": "", "seed_value": "", "dit_model": "None (Analysis Only)"},)
    if not data.candidates:
        return tuple(shared | _song_fields(data.task_id, audio) for audio in data.audios)
    shared |= {"candidates": [each.model_dump(mode="json") for each in data.candidates]}
    scores = {each.index: each.score for each in data.candidates if each.kept}
    songs = enumerate(data.audios)
    return tuple(shared | _song_fields(data.task_id, audio) | {"score": scores.get(index)} for index, audio in songs)


def _song_fields(task_id: str, audio: Audio) -> dict[str, Any]:
    url = file_url(task_id, audio)
    song = {"file": url, "url": url, "seed_value": str(audio.seed), "seed": audio.seed, "sha256": audio.sha256}
    song |= {kind: file_url(task_id, file) for kind, file in audio.lyric_files.items()}
    if audio.track is not None:
        song["track"] = audio.track
    if audio.loudness is not None:
        song["loudness"] = audio.loudness.model_dump(mode="json")
    if audio.lyric_score is None:
        return song
    lines = [line.model_dump(mode="json") for line in audio.lyrics]
    return {**song, "timestamps": lines, "lyric_score": audio.lyric_score}


def _shared(data: Completed, created: int) -> dict[str, Any]:
    """Return what all items of a task have in common."""
    metas = data.metas
    caption, lyrics = metas.caption or data.request.prompt, metas.lyrics or data.request.lyrics
    known = {
        "bpm": metas.bpm or _UNKNOWN,
        "duration": metas.duration or _length(data) or _UNKNOWN,
        "keyscale": metas.keyscale or _UNKNOWN,
        "timesignature": metas.timesignature or _UNKNOWN,
    }
    sent = {"prompt": data.request.prompt, "lyrics": data.request.lyrics}
    return {
        "file": "",
        "wave": "",
        "status": SUCCEEDED,
        "create_time": created,
        "env": _ENV,
        "prompt": caption,
        "lyrics": lyrics,
        "metas": {**known, "genres": _UNKNOWN, **sent},
        "generation_info": _generation_info(data.timings, len(data.audios)),
        "lm_model": data.lm.model if data.lm else "",
        "dit_model": data.model.used,
        "progress": 1.0,
        "stage": "succeeded",
        "error": None,
        **known,
        "caption": caption,
        "vocal_language": metas.language,
        "warnings": list(data.warnings),
        "adjustments": [change.model_dump(mode="json") for change in data.policy.adjustments],
        **_origin(data),
    }


def _origin(data: Completed) -> dict[str, Any]:
    """Return what songs that come from songs have besides."""
    named = {"parents": data.parents, "edits": shown_edits(data)}
    return {name: [each.model_dump(mode="json") for each in given] for name, given in named.items() if given}


def shown_edits(data: Completed) -> tuple[Edit, ...]:
    """Return the edits, without places that audio comes from."""
    return tuple(edit for edit in data.edits if edit.field not in INPUTS)


def _analysis(data: Completed) -> dict[str, Any]:
    """Return the one item of an analysis, which is a plain dictionary there, too."""
    metas = data.metas
    return {
        "status_message": "Analysis completed",
        "audio_codes": "".join(map(format_codes, data.audio_codes)),
        "caption": metas.caption,
        "lyrics": metas.lyrics,
        "bpm": metas.bpm or _UNKNOWN,
        "duration": metas.duration or _UNKNOWN,
        "keyscale": metas.keyscale or _UNKNOWN,
        "key_scale": metas.keyscale or _UNKNOWN,
        "timesignature": metas.timesignature or _UNKNOWN,
        "time_signature": metas.timesignature or _UNKNOWN,
        "language": metas.language,
    }


def _length(data: Completed) -> float | None:
    return data.audios[0].duration_s if data.audios else None


def _generation_info(timings: Timings, songs: int) -> str:
    named = (
        ("Queue", timings.queued),
        ("LM", timings.plan),
        ("DiT and VAE", timings.render),
        ("Encoding", timings.encode),
        ("Upload", timings.upload),
        ("Total", timings.total),
    )
    lines = [f"- **{name}:** {seconds:.2f}s" for name, seconds in named if seconds is not None]
    return "\n".join((f"**Generated {_songs(songs)}**", *lines))


def _songs(number: int) -> str:
    return "1 song" if number == 1 else f"{number} songs"
