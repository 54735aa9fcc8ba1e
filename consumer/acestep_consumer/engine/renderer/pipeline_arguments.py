# SPDX-License-Identifier: Apache-2.0
"""Arguments of one rendering: a job, its plan and its decoded inputs, translated once for ``AceStepPipeline``.

A new field of the request is one field of ``PipelineArguments``, set in ``arguments_for`` and read where it acts.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad

from acestep_consumer.domain.audio_codes import CODES_PER_SECOND, parse_songs
from acestep_consumer.domain.edits import extension
from acestep_consumer.domain.errors import InvalidRequest, LimitExceeded, RenderFailed
from acestep_consumer.domain.job import Job, LoadedModel, Plan
from acestep_consumer.domain.tasks import TASKS, Variant
from acestep_consumer.engine.renderer.denoising.dcw import Dcw
from acestep_consumer.engine.renderer.denoising.flow_edit import FlowEditRequest
from acestep_consumer.engine.renderer.denoising.sample import SamplerOptions
from acestep_consumer.engine.renderer.latents import PlacedLatents, SourceLatents
from acestep_consumer.engine.renderer.output import KeptSamples, OutputRules
from acestep_consumer.engine.renderer.window import KeepRules, Window, keep_rules
from acestep_schemas.events import Adjustment, Edit
from acestep_schemas.request import FieldProblem, GenerationRequest, TaskType

# Sent by ACE-Step's clients with every task: it stands for "the task's own instruction".
DEFAULT_INSTRUCTION = "Fill the audio semantic mask based on the given conditions:"

_NO_GUIDANCE = 1.0
_TAG = re.compile(r"\[[^\]]*\]")
_WHOLE = 1e-3
"""Frames by which a length in frames may miss a whole number."""
# A caption in the form of the model's training, as ACE-Step's own tools save it.
_TRAINING_CAPTION = re.compile(r"# *Instruction\b.*?# *Caption *\n(.*?)(?:\n\s*# *Metas|$)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PipelineArguments:
    """Arguments of one job's songs. Names and meanings are those of ``AceStepPipeline.__call__``, unless noted.

    Attributes:
        prompt: caption of all songs.
        lyrics: lyrics of all songs, as they are given.
        vocal_language: ISO 639-1 code.
        instruction: None: the task's own.
        bpm: beats per minute; None: not named in the text condition, as for the next two.
        keyscale: such as ``A minor``.
        timesignature: ``2``, ``3``, ``4`` or ``6``.
        task_type: as requested; see ``model_task``.
        track_name: for ``extract`` and ``lego``.
        track_classes: for ``complete`` (``complete_track_classes``).
        num_inference_steps: denoising steps, unless ``timesteps`` are given.
        shift: shift of the flow times, unless ``timesteps`` are given.
        timesteps: flow times from 1 towards 0, without the terminal 0.
        guidance_scale: classifier-free guidance; 1 and below is none.
        cfg_interval_start: lowest flow time, 0 (song) to 1 (noise), with guidance.
        cfg_interval_end: highest flow time with guidance.
        use_adg: guidance by angles (ADG) in place of APG.
        audio_cover_strength: part of the steps, 0 to 1, after which the text alone steers the song.
        cover_noise_strength: how far a cover starts from its source in place of noise, 0 to 1.
        sampler: how the songs are sampled.
        flow_edit: what turns ``src_audio`` into the song; None: it is no flow edit.
        retake_seeds: a seed per song of the noise that ``retake_variance`` mixes in.
        retake_variance: part of the other noise, 0 to 1.
        device_noise: whether noise is drawn on the device, in place of the CPU.
        audio_duration: seconds that the text condition names, and the length of a song from text alone; None: the
            length of ``src_audio`` or of ``audio_codes``, else the pipeline's default.
        src_audio: source audio, [2, samples] at the model's sample rate.
        src_latents: latents of ``src_audio``, which are used in place of encoding it; None: it is encoded.
        reference_audio: timbre reference, [2, samples] at the model's sample rate.
        repainting_start: seconds into ``src_audio``; None: no window, the whole song is made.
        repainting_end: seconds into ``src_audio``; None: its end.
        explicit_mask: whether the model is shown which part to make.
        keep: how the source around a window is kept.
        audio_codes: codes of each song, equally many, 5 a second; empty: none.
        seeds: a seed per song.
        tiled: whether the VAE encodes in tiles.
        output: what is done to the samples.
        align: whether the songs are aligned with their lyrics, for times or for a score.
        edits: the window of an extension of source audio.
        adjustments: values that a limit has changed.
        warnings: values that had no effect.
    """

    prompt: str
    lyrics: str
    vocal_language: str = "en"
    instruction: str | None = None
    bpm: int | None = None
    keyscale: str | None = None
    timesignature: str | None = None
    task_type: TaskType = "text2music"
    track_name: str | None = None
    track_classes: tuple[str, ...] = ()
    num_inference_steps: int = 8
    shift: float = 3.0
    timesteps: tuple[float, ...] | None = None
    guidance_scale: float = _NO_GUIDANCE
    cfg_interval_start: float = 0.0
    cfg_interval_end: float = 1.0
    use_adg: bool = False
    audio_cover_strength: float = 1.0
    cover_noise_strength: float = 0.0
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    flow_edit: FlowEditRequest | None = None
    retake_seeds: tuple[int, ...] = ()
    retake_variance: float = 0.0
    device_noise: bool = False
    audio_duration: float | None = None
    src_audio: torch.Tensor | None = None
    src_latents: PlacedLatents | None = None
    reference_audio: torch.Tensor | None = None
    repainting_start: float | None = None
    repainting_end: float | None = None
    explicit_mask: bool = False
    keep: KeepRules = field(default_factory=KeepRules)
    audio_codes: tuple[tuple[int, ...], ...] = ()
    seeds: tuple[int, ...]
    tiled: bool = True
    output: OutputRules = field(default_factory=OutputRules)
    align: bool = False
    edits: tuple[Edit, ...] = ()
    adjustments: tuple[Adjustment, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def model_task(self) -> TaskType:
        """The task as the model knows it."""
        return TASKS[self.task_type].model_task(from_codes=bool(self.audio_codes))

    def kept_samples(self, sample_rate: int) -> KeptSamples | None:
        """Return the samples of the source that the song keeps outside its window; None: it keeps none."""
        if self.src_audio is None or self.keep.samples_s is None or not TASKS[self.task_type].has_window:
            return None
        window = Window.of(self.repainting_start, self.repainting_end, sample_rate, self.src_audio.shape[-1])
        return None if window.whole else KeptSamples(self.src_audio, window, int(self.keep.samples_s * sample_rate))

    def level(self, sample_rate: int) -> float:
        """Return what the decoded samples are multiplied by before anything else.

        Latents have the level of the decoder, and the samples that are kept around a window that of their file.
        """
        if self.src_latents is None or self.kept_samples(sample_rate) is None:
            return 1.0
        return self.src_latents.gain

    @property
    def switches(self) -> bool:
        """Whether the text alone steers the song from some step on."""
        return self.audio_cover_strength < 1

    @property
    def guided(self) -> bool:
        """Whether there is classifier-free guidance: not without a scale, nor at flow times that there are none of."""
        return self.guidance_scale > _NO_GUIDANCE and self.cfg_interval_start <= self.cfg_interval_end


@dataclass(frozen=True, slots=True)
class DecodedInputs:
    """Decoded audio inputs, [2, samples] each at the model's sample rate; and the source's own latents, if any."""

    source: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    latents: SourceLatents | None = None


def codes_of(job: Job, plan: Plan) -> tuple[str, ...]:
    """Return the audio codes that the songs are made from: the planner's, else the request's, else none."""
    given = plan.audio_codes or (job.request.audio_code_string,)
    return tuple(codes for codes in given if codes.strip())


def reads_source(job: Job, plan: Plan) -> bool:
    """Whether the source audio is used: by text2music for a flow edit alone, and not where there are audio codes."""
    asked = job.request
    return TASKS[asked.task_type].uses_source(asked) and not codes_of(job, plan)


def arguments_for(
    job: Job, plan: Plan, model: LoadedModel, inputs: DecodedInputs = DecodedInputs()
) -> PipelineArguments:
    """Translate one admitted job. Values of the plan take precedence over those of the request.

    Raises:
        RenderFailed: the task cannot be done with these inputs.
        LimitExceeded: an input is longer than the tier allows, and the request asked for rejection.
    """
    asked, metas = job.request, plan.metas
    builder = _MaterialBuilder(job, plan, model, inputs)
    material = builder.build()
    return PipelineArguments(
        prompt=_caption(metas.caption or asked.prompt, asked, model),
        lyrics=metas.lyrics or asked.lyrics,
        vocal_language=metas.language or asked.vocal_language,
        instruction=_instruction(asked.instruction),
        bpm=metas.bpm or asked.bpm,
        keyscale=metas.keyscale or asked.key_scale,
        timesignature=metas.timesignature or asked.time_signature,
        task_type=asked.task_type,
        track_name=asked.track_name,
        track_classes=asked.track_classes,
        num_inference_steps=asked.inference_steps,
        shift=asked.shift,
        timesteps=_timesteps(asked.timesteps),
        guidance_scale=_NO_GUIDANCE if model.variant is Variant.TURBO else asked.guidance_scale,
        cfg_interval_start=asked.cfg_interval_start,
        cfg_interval_end=asked.cfg_interval_end,
        use_adg=asked.use_adg and not asked.flow_edit_morph,
        audio_cover_strength=asked.audio_cover_strength if _has_source(job, plan) else 1.0,
        cover_noise_strength=asked.cover_noise_strength if _has_source(job, plan) else 0.0,
        sampler=_sampler(asked, model),
        flow_edit=_flow_edit(asked),
        retake_seeds=tuple((asked.retake_seed or 0) + index for index in range(len(job.seeds))),
        retake_variance=asked.retake_variance,
        device_noise=asked.noise == "device",
        audio_duration=material.audio_duration,
        src_audio=material.src_audio,
        src_latents=material.src_latents,
        reference_audio=inputs.reference,
        repainting_start=material.repainting_start,
        repainting_end=material.repainting_end,
        explicit_mask=asked.chunk_mask_mode == "explicit" and TASKS[asked.task_type].has_window,
        keep=_keep(asked, model),
        audio_codes=material.audio_codes,
        seeds=job.seeds,
        tiled=asked.use_tiled_decode,
        output=_output(job),
        align=(asked.timestamps or asked.candidates is not None) and sings(metas.lyrics or asked.lyrics),
        edits=tuple(builder.edits),
        adjustments=tuple(builder.adjustments),
        warnings=(
            *_without_effect(asked, model, covers=_covers(job, plan)),
            *_without_lyrics(asked, metas.lyrics or asked.lyrics),
            *builder.warnings,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Material:
    """The fields of ``PipelineArguments`` that say what the songs are made from, and how long they are."""

    audio_duration: float | None = None
    src_audio: torch.Tensor | None = None
    src_latents: PlacedLatents | None = None
    repainting_start: float | None = None
    repainting_end: float | None = None
    audio_codes: tuple[tuple[int, ...], ...] = ()


@dataclass(slots=True)
class _MaterialBuilder:
    """Chooses and limits the material of one job, with a note on each value that is changed or not used."""

    job: Job
    plan: Plan
    model: LoadedModel
    inputs: DecodedInputs
    edits: list[Edit] = field(default_factory=list)
    adjustments: list[Adjustment] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def build(self) -> _Material:
        """Return the material: audio codes take the place of source audio."""
        codes = codes_of(self.job, self.plan)
        return self._from_codes(codes) if codes else self._from_audio()

    @property
    def _request(self) -> GenerationRequest:
        return self.job.request

    @property
    def _named(self) -> float | None:
        """The seconds that the plan or the request names."""
        return self.plan.metas.duration or self._request.audio_duration

    def _from_codes(self, texts: tuple[str, ...]) -> _Material:
        if self.inputs.source is not None or self._request.src_audio_path:
            self.warnings.append("src_audio_path was not used: the song is made from audio codes")
        try:
            songs = parse_songs(texts, len(self.job.seeds))
        except ValueError as error:
            raise RenderFailed(str(error)) from error
        kept = int(self._within_limit(len(songs[0]) / CODES_PER_SECOND, "the audio codes") * CODES_PER_SECOND)
        self._note_length(kept / CODES_PER_SECOND, "the audio codes")
        return _Material(
            audio_duration=self._named if TASKS[self._request.task_type].names_length else None,
            audio_codes=tuple(codes[:kept] for codes in songs),
        )

    def _from_audio(self) -> _Material:
        if not reads_source(self.job, self.plan):
            if self._request.src_audio_path:
                self.warnings.append(f"src_audio_path was not used: {self._request.task_type} has no source")
            return _Material(audio_duration=self._duration())
        if self.inputs.source is None:
            raise RenderFailed(f"task_type {self._request.task_type} needs source audio")
        task = TASKS[self._request.task_type]
        if task.has_window:
            return self._windowed(self.inputs.source)
        seconds = self._within_limit(self.inputs.source.shape[-1] / self.model.sample_rate, "the source audio")
        self._note_length(seconds, "the source audio")
        return _Material(
            # As in ACE-Step, its text names the planned length, while the song is as long as the source.
            audio_duration=self._named if task.names_length and task.reads_source else None,
            src_audio=self.inputs.source[:, : round(seconds * self.model.sample_rate)],
            src_latents=self._placed(0.0, seconds),
        )

    def _windowed(self, source: torch.Tensor) -> _Material:
        """Return the source of a repaint or lego, with silence where the window is beyond its ends."""
        rate = self.model.sample_rate
        seconds = source.shape[-1] / rate
        asked = self._extended(seconds)
        before, end = max(0.0, -asked.repainting_start), asked.repainting_end
        after = max(0.0, (end or 0.0) - seconds)
        self._check_window(before, seconds)
        extended = before > 0 or after > 0
        if before > 0 and after > 0:
            self.warnings.append(
                "repainting_start and repainting_end are beyond both ends of the source: all of it is made anew. To "
                "keep it, extend it on one side, then the result on the other one"
            )
        what = "the extended song" if extended else "the source audio"
        length = round(self._within_limit(before + seconds + after, what) * rate)
        silence = min(int(after * rate), max(length - int(before * rate) - source.shape[-1], 0))
        self._note_length(length / rate, what)
        material = _Material(
            audio_duration=min(seconds, length / rate) if extended else None,
            src_audio=pad(source, (int(before * rate), silence))[:, :length],
            src_latents=self._placed(before, length / rate),
        )
        if end is not None and end <= asked.repainting_start:
            return material
        return replace(
            material,
            repainting_start=asked.repainting_start + before,
            repainting_end=None if end is None else end + before,
        )

    def _extended(self, seconds: float) -> GenerationRequest:
        """Return the request with the window of an extension, for source audio of so many seconds."""
        asked = self._request
        if asked.extend_right_s is None:
            return asked
        self.edits += extension(asked.extend_right_s, seconds)
        return asked.model_copy(update={edit.field: edit.value for edit in self.edits})

    def _placed(self, before: float, seconds: float) -> PlacedLatents | None:
        """Return the source's latents in a song of so many seconds, ``before`` of them silence before the source.

        None where there are none, or they would lie beside their samples: silence is whole frames.
        """
        latents, source, rate = self.inputs.latents, self.inputs.source, self.model.latent_rate
        if latents is None or source is None:
            return None
        first = round(before * rate)
        if abs(first - before * rate) > _WHOLE:
            frame = 1 / rate
            self.warnings.append(f"the source's audio was encoded: its latents begin at multiples of {frame:g} seconds")
            return None
        added = seconds - before - source.shape[-1] / self.model.sample_rate
        after = math.ceil(added * rate - _WHOLE) if added > 0 else 0
        cut = math.ceil(seconds * rate) - first if added < 0 else len(latents.values)
        return PlacedLatents(latents.values[: max(cut, 0)], latents.gain, before=first, after=after)

    def _duration(self) -> float | None:
        """Return the seconds of a song from text alone; None is the pipeline's default, 60."""
        seconds = self._named
        return None if seconds is None else self._within_limit(seconds, "the planned song")

    def _check_window(self, before: float, seconds: float) -> None:
        """Refuse a window that is nowhere: ``before`` are the seconds that a song is extended to the left."""
        start, limit = self._request.repainting_start, self.job.policy.limits.max_duration_s
        if before >= limit:
            rule = f"must leave room for the source audio: this worker allows songs of {limit} seconds"
        elif self._request.repainting_end is None and start >= seconds:
            rule = f"must be below the length of the source audio, {seconds:.2f} seconds"
        elif start >= limit:
            rule = f"must be below the length of a song, and this worker allows {limit} seconds"
        else:
            return
        raise InvalidRequest([FieldProblem(field="repainting_start", value=f"{start:g}", rule=rule)])

    def _within_limit(self, seconds: float, what: str) -> float:
        """Apply the tier's duration limit, which admission could not apply to inputs of unknown length."""
        limit = self.job.policy.limits.max_duration_s
        if seconds <= limit:
            return seconds
        reason = f"{what}: {seconds:.2f} seconds, and this worker allows {limit}"
        cut = Adjustment(field="audio_duration", requested=round(seconds, 2), applied=limit, reason=reason)
        if self._request.on_limit == "reject":
            raise LimitExceeded(f"{reason} (on_limit is reject)", [cut.model_dump(mode="json")])
        self.adjustments.append(cut)
        return float(limit)

    def _note_length(self, seconds: float, source: str) -> None:
        asked = self._request.audio_duration
        if asked is not None and abs(asked - seconds) >= 1:
            self.warnings.append(
                f"audio_duration = {asked:g} did not set the length: {source} has {seconds:.2f} seconds"
            )


def _covers(job: Job, plan: Plan) -> bool:
    """Whether the model does a cover; text2music from audio codes is one."""
    return TASKS[job.request.task_type].model_task(from_codes=bool(codes_of(job, plan))) == "cover"


def _has_source(job: Job, plan: Plan) -> bool:
    """Whether the strengths of a source count. A song from text alone has none, a flow edit takes its source whole."""
    asked = job.request
    return not asked.flow_edit_morph and (TASKS[asked.task_type].reads_source or bool(codes_of(job, plan)))


def sings(lyrics: str) -> bool:
    """Whether there is anything to sing in lyrics, beside section tags such as ``[Intro]``."""
    return bool(_TAG.sub("", lyrics).strip())


def _sampler(asked: GenerationRequest, model: LoadedModel) -> SamplerOptions:
    """Return the sampler's options. A flow edit is done with plain Euler steps."""
    turbo, plain = model.variant is Variant.TURBO, asked.flow_edit_morph
    corrected = (turbo if asked.dcw_enabled is None else asked.dcw_enabled) and not plain
    return SamplerOptions(
        method="ode" if plain else asked.infer_method,
        heun=asked.sampler_mode == "heun" and not plain,
        heun_last_step=not turbo,
        velocity_limit=asked.velocity_norm_threshold,
        velocity_smoothing=asked.velocity_ema_factor,
        dcw=Dcw(
            mode=asked.dcw_mode,
            scale=asked.dcw_scaler,
            high_scale=asked.dcw_high_scaler,
            wavelet=asked.dcw_wavelet,
        )
        if corrected
        else None,
        rescale=asked.latent_rescale,
        offset=asked.latent_shift,
    )


def _flow_edit(asked: GenerationRequest) -> FlowEditRequest | None:
    if not asked.flow_edit_morph:
        return None
    return FlowEditRequest(
        caption=asked.flow_edit_source_caption,
        lyrics=asked.flow_edit_source_lyrics,
        start=asked.flow_edit_n_min,
        end=asked.flow_edit_n_max,
        averages=asked.flow_edit_n_avg,
    )


def _caption(given: str, asked: GenerationRequest, model: LoadedModel) -> str:
    """Return the caption in the form that the model was trained with."""
    found = _TRAINING_CAPTION.search(given)
    caption = found.group(1).strip() if found else given
    if not model.global_caption:
        return caption
    explicit = str(asked.chunk_mask_mode == "explicit").lower()
    return f"Global: {asked.global_caption}\nLocal: {caption}\nMask Control: {explicit}"


def _keep(asked: GenerationRequest, model: LoadedModel) -> KeepRules:
    return keep_rules(
        asked.repaint_mode,
        asked.repaint_strength,
        last_step=model.variant is not Variant.TURBO,
        latent_frames=asked.repaint_latent_crossfade_frames,
        samples_s=asked.repaint_wav_crossfade_sec,
    )


def _output(job: Job) -> OutputRules:
    """Return what is done to the samples. As in ACE-Step, a peak above full scale is no level to scale to."""
    asked = job.request
    scaled = asked.enable_normalization and asked.normalization_db <= 0
    return OutputRules(
        peak=10 ** (asked.normalization_db / 20) if scaled else None,
        fade_in_s=asked.fade_in_duration,
        fade_out_s=asked.fade_out_duration,
        raises_new_part=job.source is None,
    )


def _instruction(given: str | None) -> str | None:
    return None if not given or given.strip() in ("", DEFAULT_INSTRUCTION) else given


def _timesteps(given: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Return the times without ACE-Step's terminal 0: the scheduler appends one itself, and two would waste a step."""
    kept = tuple(time for time in given or () if time > 0)
    return kept or None


def _without_effect(asked: GenerationRequest, model: LoadedModel, *, covers: bool) -> Iterator[str]:
    """Yield a warning for each requested value that has no effect. A value at its default was not requested."""
    default = GenerationRequest.model_fields
    turbo = model.variant is Variant.TURBO
    if asked.use_adg and turbo:
        yield "use_adg had no effect: turbo models have guidance built in"
    if turbo and asked.guidance_scale not in (default["guidance_scale"].default, _NO_GUIDANCE):
        yield f"guidance_scale = {asked.guidance_scale:g} had no effect: turbo models have guidance built in"
    if turbo and (asked.cfg_interval_start, asked.cfg_interval_end) != (0, 1):
        yield "cfg_interval_start and cfg_interval_end had no effect: turbo models have guidance built in"
    yield from _source_without_effect(asked, model, covers=covers)
    yield from _sampler_without_effect(asked, model)
    if asked.timesteps and asked.inference_steps != default["inference_steps"].default:
        yield f"inference_steps = {asked.inference_steps} had no effect: timesteps were given"
    yield from _output_without_effect(asked)
    yield from _window_without_effect(asked)
    if asked.global_caption and not model.global_caption:
        yield f"global_caption had no effect: {model.name} takes none"


def _without_lyrics(asked: GenerationRequest, lyrics: str) -> Iterator[str]:
    if asked.timestamps and not sings(lyrics):
        yield "timestamps had no effect: the song has no lyrics"


def _source_without_effect(asked: GenerationRequest, model: LoadedModel, *, covers: bool) -> Iterator[str]:
    if not TASKS[asked.task_type].reads_source and (asked.flow_edit_morph or not covers):
        instead = "a flow edit takes its source whole" if asked.flow_edit_morph else "the song is made from text alone"
        for name in ("audio_cover_strength", "cover_noise_strength"):
            if _is_given(asked, name):
                yield f"{name} = {getattr(asked, name):g} had no effect: {instead}"
    elif asked.cover_noise_strength and (model.variant is Variant.SFT or model.wide):
        yield f"cover_noise_strength = {asked.cover_noise_strength:g}: with {model.name} the song may be almost silent"


def _sampler_without_effect(asked: GenerationRequest, model: LoadedModel) -> Iterator[str]:
    if asked.sampler_mode == "heun" and asked.infer_method == "sde":
        yield "sampler_mode = heun had no effect: infer_method is sde"
    if asked.dcw_enabled and model.variant is not Variant.TURBO:
        yield f"dcw_enabled: DCW was made for turbo models, and may spoil the songs of {model.name}"
    if asked.retake_seed is not None and not asked.retake_variance:
        yield "retake_seed had no effect: retake_variance is 0"


def _output_without_effect(asked: GenerationRequest) -> Iterator[str]:
    for name in ("mp3_bitrate", "mp3_sample_rate"):
        if asked.audio_format != "mp3" and _is_given(asked, name):
            yield f"{name} = {getattr(asked, name)} had no effect: the format is {asked.audio_format}"
    if asked.normalization_db > 0:
        yield f"normalization_db = {asked.normalization_db:g} is above full scale: the song is not normalised"
    elif not asked.enable_normalization and _is_given(asked, "normalization_db"):
        yield "normalization_db had no effect: enable_normalization is false"
    if asked.loudness_lufs is None and _is_given(asked, "true_peak_db"):
        yield "true_peak_db had no effect: loudness_lufs is not given"


def _window_without_effect(asked: GenerationRequest) -> Iterator[str]:
    names = (
        *("repaint_mode", "repaint_strength", "repaint_latent_crossfade_frames", "repaint_wav_crossfade_sec"),
        "chunk_mask_mode",
    )
    for name in names:
        if not TASKS[asked.task_type].has_window and _is_given(asked, name):
            yield f"{name} = {getattr(asked, name)} had no effect: {asked.task_type} has no window"
    if TASKS[asked.task_type].has_window and asked.repaint_mode != "balanced" and _is_given(asked, "repaint_strength"):
        yield f"repaint_strength = {asked.repaint_strength:g} had no effect: repaint_mode is {asked.repaint_mode}"


def _is_given(asked: GenerationRequest, name: str) -> bool:
    """Whether a field has another value than its default."""
    return bool(getattr(asked, name) != GenerationRequest.model_fields[name].default)
