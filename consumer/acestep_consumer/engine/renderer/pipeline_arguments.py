# SPDX-License-Identifier: Apache-2.0
"""A job and its plan as arguments of ``AceStepPipeline.__call__``, and what of the job has no counterpart there. Pure.

Audio is passed through untouched, so that nothing here needs torch.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from acestep_consumer.domain.errors import LimitExceeded, RenderFailed
from acestep_consumer.domain.job import Job, LoadedModel, Plan
from acestep_consumer.domain.tasks import TASKS, Variant
from acestep_schemas.events import Adjustment
from acestep_schemas.request import GenerationRequest

# Sent by ACE-Step's clients with every task: it stands for "the task's own instruction".
DEFAULT_INSTRUCTION = "Fill the audio semantic mask based on the given conditions:"
INSTRUMENTAL = "[Instrumental]"
CODES_PER_SECOND = 5

_CODE = re.compile(r"<\|audio_code_\d+\|>")
_NO_GUIDANCE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineArguments:
    """One call of the pipeline: its arguments less generators and callbacks, a seed per song, and how to sample."""

    pipeline: Mapping[str, Any]
    seeds: tuple[int, ...]
    steps: int
    method: Literal["ode", "sde"]
    tiled: bool
    adjustments: tuple[Adjustment, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodedInputs:
    """Decoded audio inputs at the model's sample rate: anything of shape [2, samples]."""

    source: Any = None
    reference: Any = None


def codes_of(job: Job, plan: Plan) -> tuple[str, ...]:
    """Return the audio codes that the songs are made from: the planner's, else the request's, else none."""
    given = plan.audio_codes or (job.request.audio_code_string,)
    return tuple(codes for codes in given if codes.strip())


def reads_source(job: Job, plan: Plan) -> bool:
    """Whether the source audio is used: not by text2music, and not where audio codes stand in its place."""
    return TASKS[job.request.task_type].reads_source and not codes_of(job, plan)


def arguments_for(
    job: Job, plan: Plan, model: LoadedModel, inputs: DecodedInputs = DecodedInputs()
) -> PipelineArguments:
    """Translate one admitted job.

    Raises:
        RenderFailed: the task cannot be done with what was given.
        LimitExceeded: the input is longer than the tier allows and the request asked for rejection.
    """
    draft = ArgumentBuilder(job, plan, model, inputs)
    pipeline = {**draft.texts(), **draft.sampling(), **draft.material()}
    return PipelineArguments(
        pipeline=pipeline,
        seeds=job.seeds,
        steps=len(pipeline["timesteps"] or ()) or pipeline["num_inference_steps"],
        method=job.request.infer_method,
        tiled=job.request.use_tiled_decode,
        adjustments=tuple(draft.adjustments),
        warnings=tuple(draft.warnings),
    )


@dataclass(slots=True)
class ArgumentBuilder:
    """Collects the pipeline arguments of one job."""

    job: Job
    plan: Plan
    model: LoadedModel
    inputs: DecodedInputs
    adjustments: list[Adjustment] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def request(self) -> GenerationRequest:
        """The effective request."""
        return self.job.request

    def texts(self) -> dict[str, Any]:
        """Everything that the text encoder reads but the duration."""
        metas, asked, songs = self.plan.metas, self.request, len(self.job.seeds)
        return {
            "prompt": [metas.caption or asked.prompt] * songs,
            "lyrics": [_lyrics(metas.lyrics or asked.lyrics)] * songs,
            "vocal_language": metas.language or asked.vocal_language,
            "instruction": _instruction(asked.instruction),
            "bpm": metas.bpm or asked.bpm,
            "keyscale": metas.keyscale or asked.key_scale,
            "timesignature": metas.timesignature or asked.time_signature,
            "task_type": asked.task_type,
            "track_name": asked.track_name,
            "complete_track_classes": list(asked.track_classes) or None,
        }

    def sampling(self) -> dict[str, Any]:
        """Steps, guidance and the blend of a cover."""
        asked = self.request
        self.warnings += _without_effect(asked, self.model, covers=self._covers())
        turbo = self.model.variant is Variant.TURBO
        return {
            "num_inference_steps": asked.inference_steps,
            "shift": asked.shift,
            "timesteps": _timesteps(asked.timesteps),
            "guidance_scale": _NO_GUIDANCE if turbo else asked.guidance_scale,
            "cfg_interval_start": asked.cfg_interval_start,
            "cfg_interval_end": asked.cfg_interval_end,
            "audio_cover_strength": asked.audio_cover_strength,
        }

    def material(self) -> dict[str, Any]:
        """What the song is made from, and how long it is. Audio codes take the place of source audio."""
        codes = codes_of(self.job, self.plan)
        made_from = self._from_codes(codes) if codes else self._from_audio()
        return {"reference_audio": self.inputs.reference, **made_from}

    def _covers(self) -> bool:
        """Whether the pipeline will see a cover; with audio codes, text2music becomes one."""
        task = self.request.task_type
        return task == "cover" or (task == "text2music" and bool(codes_of(self.job, self.plan)))

    def _from_codes(self, codes: tuple[str, ...]) -> dict[str, Any]:
        if self.inputs.source is not None or self.request.src_audio_path:
            self.warnings.append("src_audio_path was not used: the song is made from audio codes")
        found = [_CODE.findall(each) for each in codes]
        if len({len(each) for each in found}) > 1 or len(codes) not in (1, len(self.job.seeds)):
            raise RenderFailed("the songs of one request need equally many audio codes each")
        count = len(found[0])
        if count == 0:
            raise RenderFailed("audio_code_string holds no code; codes look like <|audio_code_123|>")
        kept = int(self._within_limit(count / CODES_PER_SECOND, "the audio codes") * CODES_PER_SECOND)
        self._note_length(kept / CODES_PER_SECOND, "the audio codes")
        cut = ["".join(each[:kept]) for each in found]
        return {"audio_duration": None, "audio_codes": cut * len(self.job.seeds) if len(cut) == 1 else cut}

    def _from_audio(self) -> dict[str, Any]:
        if not reads_source(self.job, self.plan):
            if self.request.src_audio_path:
                self.warnings.append("src_audio_path was not used: text2music has no source")
            return {"audio_duration": self._duration()}
        if self.inputs.source is None:
            raise RenderFailed(f"task_type {self.request.task_type} needs source audio")
        rate = self.model.sample_rate
        seconds = self._within_limit(self.inputs.source.shape[-1] / rate, "the source audio")
        self._note_length(seconds, "the source audio")
        source = self.inputs.source[:, : round(seconds * rate)]
        return {"audio_duration": None, "src_audio": source, **self._window(seconds)}

    def _duration(self) -> float | None:
        """Seconds of a song made from text alone; None leaves it to the pipeline, which sings for 60."""
        seconds = self.plan.metas.duration or self.request.audio_duration
        return None if seconds is None else self._within_limit(seconds, "the planned song")

    def _window(self, seconds: float) -> dict[str, Any]:
        asked = self.request
        if not TASKS[asked.task_type].has_window:
            return {}
        if asked.repainting_start >= seconds:
            raise RenderFailed(
                f"repainting_start = {asked.repainting_start:g}: the source audio has {seconds:.2f} seconds"
            )
        end = asked.repainting_end if (asked.repainting_end or 0) > 0 else None
        if end is not None and end > seconds:
            self.warnings.append(f"repainting_end = {end:g} is past the end of the source audio, {seconds:.2f} seconds")
            end = None
        return {"repainting_start": asked.repainting_start, "repainting_end": end}

    def _within_limit(self, seconds: float, what: str) -> float:
        """Policy could not see how long an input is; its limit holds here as well."""
        limit = self.job.policy.limits.max_duration_s
        if seconds <= limit:
            return seconds
        reason = f"{what}: {seconds:.2f} seconds, and this worker allows {limit}"
        cut = Adjustment(field="audio_duration", requested=round(seconds, 2), applied=limit, reason=reason)
        if self.request.on_limit == "reject":
            raise LimitExceeded(f"{reason} (on_limit is reject)", [cut.model_dump(mode="json")])
        self.adjustments.append(cut)
        return float(limit)

    def _note_length(self, seconds: float, source: str) -> None:
        asked = self.request.audio_duration
        if asked is not None and abs(asked - seconds) >= 1:
            self.warnings.append(f"audio_duration = {asked:g} was not used: {source} has {seconds:.2f} seconds")


def _lyrics(given: str) -> str:
    """Lyrics as they are; every way to say "nobody sings" becomes the one that the model was trained with."""
    return INSTRUMENTAL if given.strip().lower() in ("", "[inst]", "[instrumental]") else given


def _instruction(given: str | None) -> str | None:
    return None if not given or given.strip() in ("", DEFAULT_INSTRUCTION) else given


def _timesteps(given: tuple[float, ...] | None) -> list[float] | None:
    """ACE-Step's lists end in the terminal 0. The scheduler appends that itself; with two, a step would do nothing."""
    kept = [time for time in given or () if time > 0]
    return kept or None


def _without_effect(asked: GenerationRequest, model: LoadedModel, *, covers: bool) -> Iterator[str]:
    """Name what was asked for and will not happen. A value left at its default was not asked for."""
    default = GenerationRequest.model_fields
    turbo = model.variant is Variant.TURBO
    if asked.use_adg:
        instead = "turbo models have guidance built in" if turbo else "the model's usual guidance (APG) was used"
        yield f"use_adg had no effect: there is no adaptive dual guidance here; {instead}"
    if turbo and asked.guidance_scale not in (default["guidance_scale"].default, _NO_GUIDANCE):
        yield f"guidance_scale = {asked.guidance_scale:g} had no effect: turbo models have guidance built in"
    if turbo and (asked.cfg_interval_start, asked.cfg_interval_end) != (0, 1):
        yield "cfg_interval_start and cfg_interval_end had no effect: turbo models have guidance built in"
    if asked.audio_cover_strength < 1 and not covers:
        yield f"audio_cover_strength = {asked.audio_cover_strength:g} had no effect: the task is no cover"
    if asked.timesteps and asked.inference_steps != default["inference_steps"].default:
        yield f"inference_steps = {asked.inference_steps} had no effect: timesteps were given"
