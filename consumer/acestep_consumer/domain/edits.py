# SPDX-License-Identifier: Apache-2.0
"""Songs from songs: what a request asks of an earlier result, in terms of the fields that exist. Pure.

An edit in a musician's words (``extend_right_s``, ``replace_lines``, ``variation``, ``stems``, ``quality: final``) is
resolved once, before admission. The request then has the values that do it, and none of the edit's own fields: sent
again as it is, it does the same. Each value that was not given becomes an ``Edit`` of the event.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from acestep_consumer.domain.audio_codes import format_codes, parse_codes
from acestep_consumer.domain.errors import InvalidRequest
from acestep_consumer.domain.fades import SongFades
from acestep_consumer.domain.job import Request, SourceSong
from acestep_consumer.domain.line_edits import rewritten
from acestep_consumer.domain.tasks import ANALYSES, TASKS, TRACK_CLASSES
from acestep_schemas.events import Audio, Completed, Edit
from acestep_schemas.request import FieldProblem, GenerationRequest

EXTENSION_OVERLAP_S: Final = 1.0
"""Seconds of the source that an extension makes anew, so that it goes on from what is played there."""

FRAMES_PER_SECOND: Final = 25
"""Latent frames. An extension to the left is a whole number of them: the source stays on their grid."""

_DESCRIPTION: Final = ("prompt", "lyrics", "vocal_language", "bpm", "key_scale", "time_signature")
_STEPS: Final = ("inference_steps", "timesteps")
_LORAS: Final = ("lora", "loras")
_MADE_WITH: Final = (
    *("model", *_LORAS, *_STEPS, "guidance_scale", "shift", "infer_method", "sampler_mode", "use_adg"),
    *("velocity_norm_threshold", "velocity_ema_factor", "cfg_interval_start", "cfg_interval_end"),
    *("dcw_enabled", "dcw_mode", "dcw_scaler", "dcw_high_scaler", "dcw_wavelet"),
)
_DELIVERED_AS: Final = (
    *("audio_format", "mp3_bitrate", "mp3_sample_rate", "timestamps"),
    *("enable_normalization", "normalization_db", "loudness_lufs", "true_peak_db"),
)
TAKEN_OVER_BY_REPAINTS: Final = (*_DESCRIPTION, "global_caption", *_MADE_WITH, *_DELIVERED_AS)
"""Fields that a repaint, an extension and new lines take over from the request of their song, unless it gives them.

They say what the song is, what it is made with, and what is asked of its file: the new part goes together with the
rest, and the new song is asked for what the first one was. What it is made with belongs to its model, and is not taken
over by a request that names another one.
"""
_ONE_OF: Final = (frozenset(_STEPS), frozenset(_LORAS))
"""Fields that say the same in two ways: where one is given, none is taken over."""
_SIDES: Final = ("extend_left_s", "extend_right_s")
_REPAINTS: Final = (*_SIDES, "replace_lines")
_TASK_OF_EDIT: Final = {**dict.fromkeys(_REPAINTS, "repaint"), "stems": "extract"}

NOT_TAKEN_OVER: Final = frozenset(
    {
        # Of the message and its handling.
        *("task_id", "strict", "on_limit", "on_model_unavailable", "queue_deadline_s"),
        # How many songs, and which seeds: this one's, once.
        *("batch_size", "candidates", "keep", "seed", "use_random_seed"),
        # What is asked for now.
        *("quality", "variation", "source_task_id", "source_index", "src_audio_path", *_TASK_OF_EDIT),
        # In no manifest.
        *("src_audio_base64", "reference_audio_base64"),
    }
)
"""Fields that a song which is made again does not take over from its parent's request; it takes over all others."""

_COUNTS: Final = frozenset({"batch_size", "candidates"})
_LATENT_CHANGES: Final = ("latent_rescale", "latent_shift")
_LM_OFF: Final[Mapping[str, JsonValue]] = {
    **dict.fromkeys(("thinking", "sample_mode", "use_format", "use_cot_metas", "use_cot_caption"), False),
    "use_cot_language": False,
    "sample_query": "",
}
"""What the language model wrote is taken over, so it writes nothing."""


@dataclass(frozen=True, slots=True)
class FoundSong:
    """A song of a completed task."""

    manifest: Completed
    index: int

    @property
    def audio(self) -> Audio:
        """The song itself."""
        return self.manifest.audios[self.index]

    @property
    def name(self) -> str:
        """The song in a sentence."""
        return f"song {self.index} of {self.manifest.task_id}"

    @property
    def codes(self) -> str:
        """The audio codes that it was made from, as text; blank where there were none."""
        codes = self.manifest.audio_codes
        return format_codes(codes[self.index] if self.index < len(codes) else codes[0]) if codes else ""

    @property
    def place(self) -> int:
        """Its place among the songs that were made, each of which has other noise mixed in by ``retake_variance``.

        Of candidates only some may have been kept; stems are all made with the noise of the first.
        """
        if self.manifest.request.stems:
            return 0
        kept = (place for place, each in enumerate(self.manifest.candidates) if each.index == self.index)
        return next(kept, self.index)

    @property
    def fades(self) -> SongFades:
        """Its fades."""
        return SongFades.of(self.manifest.request, self.audio.duration_s)

    def description(self) -> dict[str, object]:
        """Return what the song was described as, by the request or by the language model."""
        metas, request = self.manifest.metas, self.manifest.request
        return {
            "prompt": metas.caption or request.prompt,
            "lyrics": metas.lyrics or request.lyrics,
            "vocal_language": metas.language or request.vocal_language,
            "bpm": metas.bpm or request.bpm,
            "key_scale": metas.keyscale or request.key_scale,
            "time_signature": metas.timesignature or request.time_signature,
        }

    def as_source(self) -> SourceSong:
        """Return the song as the source audio of another one."""
        files = self.audio.files
        latents = files.latents.uri if files is not None and files.latents is not None else None
        return SourceSong(
            task_id=self.manifest.task_id,
            index=self.index,
            uri=self.audio.uri,
            latents=latents,
            track=self.audio.track,
        )


@dataclass(frozen=True, slots=True)
class Resolution:
    """The request that does what was asked for, and what follows from the song that it names.

    Attributes:
        request: with the effective values.
        edits: those that were not given.
        source: the song whose audio is worked on; None: the request's own source, or none.
        warnings: what could not be done as asked.
    """

    request: GenerationRequest
    edits: tuple[Edit, ...] = ()
    source: SourceSong | None = None
    warnings: tuple[str, ...] = ()

    def applied_to(self, request: Request) -> Request:
        """Return the request as it was read, with what it comes to."""
        return replace(request, body=self.request, edits=self.edits, warnings=(*request.warnings, *self.warnings))


def concerns(asked: GenerationRequest) -> bool:
    """Whether there is anything to resolve."""
    return asked.source_task_id is not None or any(True for _ in names(asked))


def names(asked: GenerationRequest) -> Iterator[str]:
    """Yield the edits that are asked for, by the names of their fields."""
    for name in (*_REPAINTS, "variation"):
        if getattr(asked, name) is not None:
            yield name
    if asked.stems:
        yield "stems"


def keeps_samples(request: GenerationRequest) -> bool:
    """Whether a request with a window has the samples of its source outside it; otherwise all of it is decoded."""
    return request.repaint_mode != "aggressive" or request.repaint_wav_crossfade_sec is not None


def is_made_again(asked: GenerationRequest) -> bool:
    """Whether the song that is named is made again, in place of being worked on."""
    return asked.variation is not None or _finishes(asked)


def check(asked: GenerationRequest) -> None:
    """Refuse edits that contradict each other or lack what they need. Raises ``InvalidRequest``."""
    problems = tuple(_problems(asked))
    if problems:
        raise InvalidRequest(problems)


def resolve(asked: GenerationRequest, song: FoundSong | None) -> Resolution:
    """Return what ``asked``, which ``check`` has passed, comes to; ``song`` is the one that it names, if it names one.

    Where the song is made again, ``source`` is None: its request's own source is the caller's to find.

    Raises:
        InvalidRequest: the song does not have what the edit needs.
    """
    builder = _RequestBuilder(asked)
    if song is not None and is_made_again(asked):
        _make_again(builder, song)
        return builder.resolution(None)
    is_repaint = asked.task_type == "repaint" or any(name in _REPAINTS for name in names(asked))
    if song is not None and is_repaint:
        _take_over(builder, song)
    if asked.extend_left_s is not None:
        _extend_left(builder, asked.extend_left_s, song)
    if asked.extend_right_s is not None:
        _extend_right(builder, asked.extend_right_s, song)
    if asked.replace_lines is not None and song is not None:
        _replace_lines(builder, asked.replace_lines, song)
    if asked.stems:
        _extract_stems(builder)
    if song is not None:
        _take_over_fades(builder, song)
    return builder.resolution(None if song is None else song.as_source())


@dataclass(slots=True)
class _RequestBuilder:
    """The request while it is resolved."""

    asked: GenerationRequest
    values: dict[str, object] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def set(self, name: str, value: object, because: str, *, shown: JsonValue = None) -> None:
        """Set a field, and note it where that is another value; ``shown`` is what is noted in place of a long one."""
        self.edits = [edit for edit in self.edits if edit.field != name]
        if getattr(self.asked, name) != value:
            noted = shown if shown is not None else _json(value)
            self.edits.append(Edit(field=name, value=noted, because=because))
        self.values[name] = value

    def take(self, name: str, value: object, because: str) -> None:
        """Set a field that the request does not give, under this name or in another way."""
        same = next((names for names in _ONE_OF if name in names), {name})
        if self.asked.model_fields_set.isdisjoint(same):
            self.set(name, value, because)

    def resolution(self, source: SourceSong | None) -> Resolution:
        done = {"extend_left_s": None, "extend_right_s": None, "replace_lines": None, "variation": None}
        request = self.asked.model_copy(update={**done, **self.values})
        return Resolution(request, tuple(self.edits), source, tuple(self.warnings))


def _finishes(asked: GenerationRequest) -> bool:
    """Whether ``quality: final`` is about the song that is named, and not about what is made of it."""
    named = asked.source_task_id is not None and asked.quality == "final" and not any(True for _ in names(asked))
    return named and "task_type" not in asked.model_fields_set and not _works_on_source(asked)


def _works_on_source(asked: GenerationRequest) -> bool:
    return TASKS[asked.task_type].uses_source(asked) or any(getattr(asked, name) for name in ANALYSES)


def _problems(asked: GenerationRequest) -> Iterator[FieldProblem]:
    edits = tuple(names(asked))
    if edits == _SIDES:
        rule = "extend_left_s is given, too, and a repaint has one part: extend the song on one side, then the result"
        yield _problem(asked, edits[1], f"{rule} on the other one")
        return
    if len(edits) > 1:
        yield _problem(asked, edits[1], f"{edits[0]} is given, too: make one song, then the other from it")
        return
    if not edits:
        if asked.source_task_id is not None and not (_works_on_source(asked) or _finishes(asked)):
            zero = [f"{name} = 0 adds nothing" for name in _SIDES if name in asked.model_fields_set]
            nothing = " and ".join(zero) or "nothing says what to make of it"
            yield _problem(
                asked,
                "source_task_id",
                f"says of which song, and {nothing}: give task_type (cover, repaint, extract, "
                "lego, complete), extend_left_s, extend_right_s, replace_lines, variation, stems, or quality = final",
            )
        return
    yield from _problems_of_edit(asked, edits[0])


def _problems_of_edit(asked: GenerationRequest, edit: str) -> Iterator[FieldProblem]:
    given = asked.model_fields_set
    if asked.source_task_id is None and edit not in (*_SIDES, "stems"):
        yield _problem(asked, edit, "needs source_task_id: the id of the task that made the song")
    elif not asked.has_source:
        yield _problem(asked, edit, "needs source_task_id, or source audio in src_audio_path")
    task = _TASK_OF_EDIT.get(edit)
    if "task_type" in given and asked.task_type != task:
        is_task = "takes the task over from its song" if task is None else f"is a {task}"
        yield _problem(asked, "task_type", f"{edit} {is_task}: leave task_type out")
    taken = {
        **dict.fromkeys(_REPAINTS, ("repainting_start", "repainting_end")),
        "variation": ("retake_variance",),
        "stems": ("track_name", "candidates", "keep"),
    }[edit]
    for name in taken:
        if name in given and getattr(asked, name) != type(asked).model_fields[name].default:
            yield _problem(asked, name, f"{edit} sets it: give one of the two")
    if edit == "replace_lines" and "lyrics" in given:
        yield _problem(asked, "lyrics", "replace_lines changes the lyrics of the song: give one of the two")
    if edit == "stems" and len(set(asked.track_classes)) > len(TRACK_CLASSES):
        yield _problem(asked, "track_classes", f"must have at most {len(TRACK_CLASSES)} names for stems")


def _take_over(builder: _RequestBuilder, song: FoundSong) -> None:
    """Take over what the new part has in common with its song, unless the request gives it."""
    asked, model = builder.asked, song.manifest.model.used
    other_model = "model" in asked.model_fields_set and asked.model != model
    values: dict[str, object] = {**dict(song.manifest.request), **song.description(), "model": model}
    for name in TAKEN_OVER_BY_REPAINTS:
        if not (other_model and name in _MADE_WITH) and name not in _set_by_quality(asked):
            builder.take(name, values[name], f"of {song.name}")


def _take_over_fades(builder: _RequestBuilder, song: FoundSong) -> None:
    """Take over the fades that are made anew, and say what does not count for the new part."""
    made = builder.resolution(None).request
    if not TASKS[made.task_type].has_window:
        return
    window, why = (made.repainting_start, made.repainting_end), "all of it is made anew"
    if song.as_source().latents is not None and not keeps_samples(made):
        window, why = (0.0, None), "the new song is made from the latents, which do not fade"
    for name, seconds in song.fades.made_anew(*window):
        builder.take(name, seconds, f"of {song.name}: {why}")
    given, before = builder.asked.model_fields_set, song.manifest.request
    builder.warnings += [warning for name, warning in song.fades.cut(*window) if name not in given]
    for name in _LATENT_CHANGES:
        value = getattr(before, name)
        if name not in given and value != type(before).model_fields[name].default:
            builder.warnings.append(
                f"{name} = {value:g} of {song.name} is not taken over: the new part does not have it. Give it to have "
                "it there, too"
            )


def _make_again(builder: _RequestBuilder, song: FoundSong) -> None:
    """Take over everything that the song was made from, unless the request gives it."""
    asked, before, because = builder.asked, song.manifest.request, f"of {song.name}"
    values: dict[str, object] = {**dict(before), **song.description(), **_LM_OFF}
    for name, value in values.items():
        if name not in NOT_TAKEN_OVER and name not in _set_by_quality(asked):
            builder.take(name, value, because)
    if codes := song.codes:
        count = f"{len(parse_codes(codes)):,} codes"
        if "audio_code_string" not in asked.model_fields_set:
            builder.values["audio_code_string"] = codes
            builder.edits = [edit for edit in builder.edits if edit.field != "audio_code_string"]
            builder.edits.append(Edit(field="audio_code_string", value=count, because=because))
    if before.stems:
        builder.set("track_name", song.audio.track, because)
    source = "the source of that song" if before.has_source else "that song has no source"
    for name in ("src_audio_path", "source_task_id", "source_index"):
        builder.set(name, getattr(before, name), source)
    builder.take("batch_size", 1, "it is one song")
    if not asked.seed:
        # Variations differ in the noise that is mixed in, so all of them have the seed of the song.
        songs = _songs_of(asked) if asked.variation is not None else 1
        builder.set("seed", (song.audio.seed,) * songs, because)
        builder.values["use_random_seed"] = False
    if asked.variation is not None:
        _vary(builder, asked.variation, before)
    elif before.retake_variance and before.retake_seed is not None:
        builder.take("retake_seed", before.retake_seed + song.place, because)
    _require_source(builder, before)


def _set_by_quality(asked: GenerationRequest) -> tuple[str, ...]:
    return () if asked.quality is None else _STEPS


def _songs_of(asked: GenerationRequest) -> int:
    """Return how many songs are asked for, whether all are kept or the best of them."""
    return max((getattr(asked, name) or 1 for name in _COUNTS & asked.model_fields_set), default=1)


def _vary(builder: _RequestBuilder, variation: float, before: GenerationRequest) -> None:
    builder.set("retake_variance", variation, f"variation = {variation:g}")
    if "retake_seed" not in builder.asked.model_fields_set:
        builder.values["retake_seed"] = None  # drawn by admission
        builder.edits = [edit for edit in builder.edits if edit.field != "retake_seed"]
    if before.retake_variance:
        builder.warnings.append(
            "the song is a variation itself: this is another variation of the one that both come from"
        )


def _require_source(builder: _RequestBuilder, before: GenerationRequest) -> None:
    """Refuse a song whose own source was in its request, and so is kept nowhere."""
    if TASKS[before.task_type].lacks_source(before):
        rule = "was made from audio in the request itself, which is not kept: send that request again, with its seed"
        raise InvalidRequest([_problem(builder.asked, "source_task_id", rule)])


def _extend_left(builder: _RequestBuilder, seconds: float, song: FoundSong | None) -> None:
    whole = max(round(seconds * FRAMES_PER_SECOND), 1) / FRAMES_PER_SECOND
    fade_s, length = (0.0, 0.0) if song is None else (song.fades.in_s, song.audio.duration_s)
    overlap, why = _overlap(fade_s, length, "the song", "fade in")
    because = f"extend_left_s = {seconds:g}, and {why}"
    builder.set("task_type", "repaint", because)
    builder.set("repainting_start", -whole, because)
    builder.set("repainting_end", overlap, because)


def _extend_right(builder: _RequestBuilder, seconds: float, song: FoundSong | None) -> None:
    if song is None:  # nobody knows the length of that source before it is decoded: the renderer sets the window
        builder.set("task_type", "repaint", f"extend_right_s = {seconds:g}")
        builder.values["extend_right_s"] = seconds
        return
    builder.set("task_type", "repaint", f"extend_right_s = {seconds:g}")
    for edit in extension(seconds, song.audio.duration_s, song.fades.out_s):
        builder.set(edit.field, edit.value, edit.because)


def extension(seconds: float, length: float, fade_out_s: float = 0.0) -> tuple[Edit, ...]:
    """Return the window of a repaint that makes a song of ``length`` seconds longer by so many on the right.

    ``fade_out_s``: its last seconds, which fade. They are made anew, or the new song would fade in its middle.
    """
    overlap, why = _overlap(fade_out_s, length, "it", "fade out")
    because = f"extend_right_s = {seconds:g}, the song has {length:g} s, and {why}"
    # Down to a millisecond: a start within the fade would cut it.
    start, end = math.floor(max(length - overlap, 0.0) * 1000 + 1e-6) / 1000, round(length + seconds, 3)
    return (
        Edit(field="repainting_start", value=start, because=because),
        Edit(field="repainting_end", value=end, because=because),
    )


def _overlap(fade_s: float, length: float, song: str, fades: str) -> tuple[float, str]:
    """Return the seconds of the song that an extension makes anew, and why: its fade, unless nothing else is left."""
    if EXTENSION_OVERLAP_S < fade_s < length:
        return fade_s, f"{fade_s:g} s of {song} {fades}"
    return EXTENSION_OVERLAP_S, f"{EXTENSION_OVERLAP_S:g} s of {song} to go on from"


def _replace_lines(builder: _RequestBuilder, lines: Mapping[str, str], song: FoundSong) -> None:
    try:
        found = rewritten(lines, str(song.description()["lyrics"]), song.audio)
    except ValueError as error:
        raise InvalidRequest([_problem(builder.asked, "replace_lines", str(error))]) from error
    builder.set("task_type", "repaint", "replace_lines")
    builder.set("repainting_start", found.start_s, found.because)
    builder.set("repainting_end", found.end_s, found.because)
    builder.set("lyrics", found.lyrics, f"the lyrics of {song.name} with the new lines")
    builder.warnings += found.warnings


def _extract_stems(builder: _RequestBuilder) -> None:
    classes = tuple(dict.fromkeys(builder.asked.track_classes)) or TRACK_CLASSES
    builder.set("task_type", "extract", "stems")
    builder.set("track_classes", classes, "stems: a song for each track")
    builder.set("batch_size", len(classes), "stems: a song for each track")


def _problem(asked: GenerationRequest, name: str, rule: str) -> FieldProblem:
    return FieldProblem(field=name, value=str(getattr(asked, name))[:100], rule=rule)


def _json(value: object) -> JsonValue:
    found: JsonValue = to_jsonable_python(value)
    return found
