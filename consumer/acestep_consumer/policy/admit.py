# SPDX-License-Identifier: Apache-2.0
"""Admission: turns a valid request into a ``Job`` within this worker's limits, or raises the reason not to. Pure.

Nothing is changed silently: every value that differs from the request becomes an adjustment in the event.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from pydantic import JsonValue

from acestep_consumer.domain.errors import (
    InvalidRequest,
    LimitExceeded,
    LmUnavailable,
    ModelUnavailable,
    TaskUnsupported,
)
from acestep_consumer.domain.job import Job, LoadedModel, Request
from acestep_consumer.domain.tasks import ANALYSES, TASKS, TRACK_CLASSES, Task, Variant, tasks_of
from acestep_consumer.policy.tiers import MAX_BPM, MIN_BPM, MIN_DURATION_S, Tier
from acestep_schemas.events import Adjustment, Edit, LimitsReport, LmChoice, ModelChoice, PolicyReport
from acestep_schemas.request import FieldProblem, GenerationRequest

_LM_REQUIRED = ("thinking", "sample_mode", "sample_query", "use_format", "analysis_only", "full_analysis_only")
_LM_COMPLETES = ("bpm", "key_scale", "time_signature", "audio_duration")
_SEED_BYTES = 4  # seeds as short as ACE-Step's own
TURBO_STEPS = 8
QUALITY_STEPS: Final[Mapping[Variant, Mapping[str, int]]] = {
    Variant.TURBO: {"draft": 4, "final": TURBO_STEPS},
    # After 4 steps their songs are little but noise.
    Variant.SFT: {"draft": 16, "final": 50},
    Variant.BASE: {"draft": 16, "final": 50},
}
"""Denoising steps of ``quality``."""
DRAFT_LM = "0.6B"
"""The language model that is enough for a draft."""
# The flow times that turbo models were trained on: those of 8 steps with shift 1, 2 and 3.
TURBO_TIMES = tuple(
    float(time)
    for time in sorted(
        {Fraction(shift * k, 8 + (shift - 1) * k) for shift in (1, 2, 3) for k in range(1, 9)}, reverse=True
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A worker's capabilities: GPU tier, models (primary first), LM and audio formats."""

    tier: Tier
    table_version: str
    vram_gb: float
    models: tuple[LoadedModel, ...]
    formats: frozenset[str]
    lm: LmChoice | None = None


def admit(request: Request, limits: Limits) -> Job:
    """Apply the tier's limits to one request.

    Raises:
        InvalidRequest: the format has no encoder here, or the task needs source audio.
        LimitExceeded: the request exceeds a limit and has ``on_limit: reject``.
        TaskUnsupported: the model cannot do the task.
        ModelUnavailable: the model is not loaded and the request has ``on_model_unavailable: fail``.
        LmUnavailable: the request needs the LM and none is loaded.
    """
    asked = _without_idle_candidates(request.body)
    _check_format(asked, limits)
    model, choice = _choose_model(asked, limits)
    quality = tuple(_quality(asked, model))
    asked = asked.model_copy(update={edit.field: edit.value for edit in quality})
    task = _task_of(asked, model, choice, limits)
    lm = _choose_lm(asked, task, limits)
    for name in ANALYSES:
        if getattr(asked, name) and not asked.has_source:
            rule = f"{name} needs source audio: s3://bucket/key or https://host/path"
            raise InvalidRequest([FieldProblem(field="src_audio_path", value="", rule=rule)])
    adjustments = (*_other_lm(asked, lm), *_turbo_steps(asked, model))
    report = _limits_for(limits.tier, with_lm=lm is not None)
    clamps = tuple(_clamps(asked, report, with_lm=lm is not None))
    if clamps and asked.on_limit == "reject":
        raise _exceeded(clamps)
    changes = {change.field: _as_field(change.applied) for change in (*adjustments, *clamps)}
    songs = int(str(changes.get(_count_field(asked), _count(asked))))
    seeds = tuple(_seeds(asked, request.task_id, 1 if asked.stems else songs)) * (songs if asked.stems else 1)
    fixed: dict[str, object] = {"task_id": request.task_id, "model": model.name, "seed": seeds, "batch_size": songs}
    fixed |= {"use_random_seed": False, "retake_seed": _retake_seed(asked, request.task_id)}
    return Job(
        task_id=request.task_id,
        request=asked.model_copy(update={**changes, **fixed}),
        model=choice,
        lm=lm,
        policy=PolicyReport(
            tier=limits.tier.name,
            vram_gb=round(limits.vram_gb, 2),
            lm_loaded=limits.lm is not None,
            table_version=limits.table_version,
            limits=report,
            adjustments=(*adjustments, *clamps),
        ),
        seeds=seeds,
        given=frozenset(asked.model_fields_set),
        warnings=(*request.warnings, *_warnings(request.body, task), *_draft_warnings(asked, lm)),
        source=request.source,
        parents=request.parents,
        edits=(*request.edits, *quality),
    )


def _check_format(asked: GenerationRequest, limits: Limits) -> None:
    if asked.audio_format not in limits.formats:
        rule = f"this worker has no encoder for it; it has {', '.join(sorted(limits.formats))}"
        raise InvalidRequest([FieldProblem(field="audio_format", value=asked.audio_format, rule=rule)])


def _choose_model(asked: GenerationRequest, limits: Limits) -> tuple[LoadedModel, ModelChoice]:
    wanted = asked.model
    loaded = {model.name: model for model in limits.models}
    primary = limits.models[0]
    model = primary if wanted is None else loaded.get(wanted)
    if model is None and asked.on_model_unavailable == "fail":
        raise ModelUnavailable(f"model {wanted} is not loaded here; loaded: {', '.join(loaded)}")
    used = model or primary
    return used, ModelChoice(requested=wanted, used=used.name, fallback=model is None)


def _task_of(asked: GenerationRequest, model: LoadedModel, choice: ModelChoice, limits: Limits) -> Task:
    """Return the task, whose source is given and which the model can do. Nothing else is ever sung in its place."""
    task = TASKS[asked.task_type]
    if (rule := task.source_rule(asked)) is not None:
        raise InvalidRequest([FieldProblem(field="src_audio_path", value="", rule=rule)])
    if model.variant not in task.variants:
        raise TaskUnsupported(_cannot(task, model, choice, limits))
    return task


def _cannot(task: Task, model: LoadedModel, choice: ModelChoice, limits: Limits) -> str:
    able = ", ".join(tasks_of(model.variant))
    fallback = f" (used instead of {choice.requested}, which is not loaded)" if choice.fallback else ""
    others = " or ".join(other.name for other in limits.models if other.variant in task.variants)
    hint = f"; give model = {others}" if others else ""
    return f"model {model.name}{fallback} cannot do task_type {task.name}; it can do {able}{hint}"


def _choose_lm(asked: GenerationRequest, task: Task, limits: Limits) -> LmChoice | None:
    """Return the LM that plans the job; None where it is skipped, since the source audio already has the content."""
    if asked.extract_codes_only:
        return None
    if not task.uses_lm and not (asked.analysis_only or asked.full_analysis_only):
        return None
    if asked.flow_edit_morph and not asked.analysis_only:
        return None
    required = [name for name in _LM_REQUIRED if getattr(asked, name)]
    if asked.audio_code_string and required == ["thinking"]:
        return None  # the codes that thinking would generate are given
    if required and limits.lm is None:
        raise LmUnavailable(f"{required[0]} needs the 5Hz language model, and this worker has none loaded")
    wanted = required or (asked.use_cot_metas and any(not getattr(asked, name) for name in _LM_COMPLETES))
    return limits.lm if wanted else None


def _other_lm(asked: GenerationRequest, lm: LmChoice | None) -> Iterator[Adjustment]:
    """Yield adjustments if the request names another LM or backend than this worker's only one."""
    if lm is None:
        return
    reason = "this worker has only one language model"
    named = (asked.lm_model_path or "").rstrip("/").rsplit("/", 1)[-1]
    if named and named != lm.model:
        yield Adjustment(field="lm_model_path", requested=asked.lm_model_path, applied=lm.model, reason=reason)
    if asked.lm_backend and asked.lm_backend != lm.backend:
        yield Adjustment(field="lm_backend", requested=asked.lm_backend, applied=lm.backend, reason=reason)


def _quality(asked: GenerationRequest, model: LoadedModel) -> Iterator[Edit]:
    """Yield the steps of a draft or of a finished song, unless the request gives steps or times."""
    if asked.quality is None or asked.timesteps or "inference_steps" in asked.model_fields_set:
        return
    steps, of_turbo = QUALITY_STEPS[model.variant][asked.quality], QUALITY_STEPS[Variant.TURBO][asked.quality]
    noise = f": after the {of_turbo} of a turbo model its songs are little but noise"
    why = noise if asked.quality == "draft" and steps > of_turbo else ""
    because = f"quality = {asked.quality}, with a {model.variant} model{why}"
    yield Edit(field="inference_steps", value=steps, because=because)


def _draft_warnings(asked: GenerationRequest, lm: LmChoice | None) -> Iterator[str]:
    if asked.quality == "draft" and lm is not None and DRAFT_LM not in lm.model:
        yield f"quality = draft: planned with {lm.model}, the only language model here, and not with the {DRAFT_LM}"


def _turbo_steps(asked: GenerationRequest, model: LoadedModel) -> Iterator[Adjustment]:
    """Yield the changes to steps and times of a turbo model, which knows the times of its training alone."""
    if model.variant is not Variant.TURBO:
        return
    if asked.timesteps:
        nearest = [min(TURBO_TIMES, key=lambda known: abs(known - time)) for time in asked.timesteps if time > 0]
        applied = nearest[: len(TURBO_TIMES)]
        if applied != [time for time in asked.timesteps if time > 0]:
            reason = f"turbo models were trained on {len(TURBO_TIMES)} times: the nearest of them are used"
            yield Adjustment(field="timesteps", requested=list(asked.timesteps), applied=applied, reason=reason)
    elif asked.inference_steps > TURBO_STEPS:
        reason = f"turbo models take at most {TURBO_STEPS} steps"
        yield Adjustment(field="inference_steps", requested=asked.inference_steps, applied=TURBO_STEPS, reason=reason)


def _limits_for(tier: Tier, *, with_lm: bool) -> LimitsReport:
    return LimitsReport(
        max_duration_s=tier.max_seconds_with_lm if with_lm else tier.max_seconds,
        max_batch_size=tier.max_batch_with_lm if with_lm else tier.max_batch,
    )


def _clamps(asked: GenerationRequest, limits: LimitsReport, *, with_lm: bool) -> Iterator[Adjustment]:
    # Only the LM was trained on a shortest song.
    shortest = MIN_DURATION_S if with_lm else 0
    bounds: tuple[tuple[str, float | None, int, int, str], ...] = (
        ("audio_duration", asked.audio_duration, shortest, limits.max_duration_s, "seconds of song"),
        # Stems are rendered as other jobs are, in as many batches as it takes.
        (_count_field(asked), None if asked.stems else _count(asked), 1, limits.max_batch_size, "songs a request"),
    )
    for field, value, least, most, unit in bounds:
        if value is not None and not least <= value <= most:
            reason = f"this worker allows {least} to {most} {unit}"
            yield Adjustment(field=field, requested=value, applied=min(max(value, least), most), reason=reason)
    if asked.candidates and asked.keep > limits.max_batch_size:
        reason = f"this worker makes at most {limits.max_batch_size} candidates"
        yield Adjustment(field="keep", requested=asked.keep, applied=limits.max_batch_size, reason=reason)


def _as_field(applied: JsonValue) -> object:
    """Return a value of an adjustment, which is JSON, as a field of a request has it."""
    return tuple(applied) if isinstance(applied, list) else applied


def _makes_no_song(asked: GenerationRequest) -> bool:
    return asked.analysis_only or asked.full_analysis_only or asked.extract_codes_only


def _without_idle_candidates(asked: GenerationRequest) -> GenerationRequest:
    """Return the request, without candidates where no song is made."""
    if asked.candidates is None or not _makes_no_song(asked):
        return asked
    return asked.model_copy(update={"candidates": None, "keep": 1, "batch_size": 1})


def _count_field(asked: GenerationRequest) -> str:
    """Return the field that says how many songs are made."""
    return "candidates" if asked.candidates else "batch_size"


def _count(asked: GenerationRequest) -> int:
    return asked.candidates or asked.batch_size


def _exceeded(clamps: tuple[Adjustment, ...]) -> LimitExceeded:
    text = "; ".join(f"{clamp.field} = {clamp.requested}: {clamp.reason}" for clamp in clamps)
    details: list[dict[str, JsonValue]] = [clamp.model_dump(mode="json") for clamp in clamps]
    return LimitExceeded(f"{text} (on_limit is reject)", details)


def _seeds(asked: GenerationRequest, task_id: str, songs: int) -> Iterator[int]:
    """Yield a seed per song: the given ones (-1: none), then counting up from the last, else derived from the task id.

    A redelivery therefore renders the same song on every worker.
    """
    given = asked.seed
    last = given[-1] if given else -1
    for index in range(songs):
        seed = given[index] if index < len(given) else last + index - len(given) + 1
        unset = seed < 0 or last < 0 <= index - len(given)
        yield _drawn(task_id, index) if unset else seed


def _retake_seed(asked: GenerationRequest, task_id: str) -> int | None:
    """Return the seed of the noise that is mixed in: the given one, else one derived from the task id, as for seeds."""
    given = asked.retake_seed
    if given is not None and given >= 0:
        return given
    return _drawn(task_id, "retake") if asked.retake_variance else None


def _drawn(task_id: str, index: int | str) -> int:
    digest = hashlib.sha256(f"{task_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:_SEED_BYTES])


def _warnings(asked: GenerationRequest, task: Task) -> Iterator[str]:
    if not task.uses_lm or asked.flow_edit_morph:
        skipped_for = "a flow edit" if task.uses_lm else task.name
        for name in ("thinking", "sample_mode", "sample_query", "use_format"):
            if getattr(asked, name):
                yield f"{name} has no effect: the language model is skipped for {skipped_for}"
    if asked.thinking and asked.audio_code_string:
        yield "thinking has no effect: audio_code_string was given"
    if asked.all_loras and _makes_no_song(asked):
        yield "lora has no effect: an analysis renders no song"
    if asked.candidates and _makes_no_song(asked):
        yield "candidates has no effect: an analysis makes no song"
    if asked.bpm is not None and not MIN_BPM <= asked.bpm <= MAX_BPM:
        yield f"bpm = {asked.bpm} goes into the prompt as it is: the models were trained on {MIN_BPM} to {MAX_BPM}"
    name, tracks = _tracks(asked, task)
    for track in tracks:
        if track.strip().lower().replace(" ", "_") not in TRACK_CLASSES:
            known = ", ".join(TRACK_CLASSES)
            yield f"{name} = {track} goes into the prompt as it is: the models were trained on {known}"


def _tracks(asked: GenerationRequest, task: Task) -> tuple[str, tuple[str, ...]]:
    """Return the tracks that are named in the prompt, and the field that names them."""
    if asked.stems or task.tracks == "track_classes":
        return "track_classes", asked.track_classes
    return "track_name", (asked.track_name,) if asked.track_name and task.tracks is not None else ()
