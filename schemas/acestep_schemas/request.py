# SPDX-License-Identifier: Apache-2.0
"""The request: one canonical model, and parsing of every body that ACE-Step 1.5's ``POST /release_task`` accepts.

Only values that are invalid on any machine are refused here. Limits that depend on the GPU (duration, batch, model) are
applied later, and reported.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from acestep_schemas import coerce, lenient
from acestep_schemas.aliases import ALIASES
from acestep_schemas.lookup import FieldNames, Found, Lookup, blank, shown

TASK_ID_PATTERN: Final = r"^[A-Za-z0-9_-]{1,128}$"
WAVELET_PATTERN: Final = (
    r"^(haar|dmey|db([1-9]|[12][0-9]|3[0-8])|sym([2-9]|1[0-9]|20)|coif([1-9]|1[0-7])"
    r"|(bior|rbio)(1\.[135]|2\.[2468]|3\.[13579]|4\.4|5\.5|6\.8))$"
)
AudioFormat = Literal["mp3", "wav", "wav32", "flac", "ogg", "opus", "aac"]
TaskType = Literal["text2music", "cover", "cover-nofsq", "repaint", "extract", "lego", "complete"]

WINDOWED_TASKS: Final = frozenset({"repaint", "lego"})
"""Tasks in which ``repainting_start`` and ``repainting_end`` select a part of the source."""

Flag = Annotated[bool, BeforeValidator(coerce.boolean)]
OptionalFlag = Annotated[bool | None, BeforeValidator(coerce.optional(coerce.boolean))]
Integer = Annotated[int, BeforeValidator(coerce.integer)]
Real = Annotated[float, BeforeValidator(coerce.real)]
Text = Annotated[str, BeforeValidator(coerce.text)]
OptionalText = Annotated[str | None, BeforeValidator(coerce.optional(coerce.text))]
Name = Annotated[str | None, BeforeValidator(coerce.optional(coerce.trimmed))]
OptionalReal = Annotated[float | None, BeforeValidator(coerce.optional(coerce.real))]
Count = Annotated[int | None, BeforeValidator(coerce.optional(coerce.positive_integer))]
Seconds = Annotated[float | None, BeforeValidator(coerce.optional(coerce.positive_real))]
# Fields that ACE-Step does not have: 0 switches them off, and less is an error.
CountOrOff = Annotated[int | None, Field(ge=0), BeforeValidator(coerce.optional(coerce.none_for_zero(coerce.integer)))]
SecondsOrOff = Annotated[float | None, Field(ge=0), BeforeValidator(coerce.optional(coerce.none_for_zero(coerce.real)))]
Level = Annotated[float | None, BeforeValidator(coerce.optional(coerce.none_for_zero(coerce.real)))]
CrossfadeFrames = Annotated[int | None, Field(ge=0), BeforeValidator(coerce.optional(coerce.integer))]
CrossfadeSeconds = Annotated[float | None, Field(ge=0), BeforeValidator(coerce.optional(coerce.real))]
Seed = Annotated[int, Field(ge=-1, le=2**63 - 1)]
Place = Annotated[str | None, BeforeValidator(coerce.optional(coerce.place))]
Embedded = Annotated[str | None, BeforeValidator(coerce.optional(coerce.base64_text))]
_Word = BeforeValidator(coerce.word)
_DAY: Final = 86_400
_MAX_LORAS: Final = 8
MAX_BASE64_CHARACTERS: Final = 96 * 1024 * 1024
"""Of an audio file in the request itself. The message as a whole has a limit of its own, mostly a lower one."""
EMBEDDED_AUDIO: Final = MappingProxyType(
    {"src_audio_base64": "src_audio_path", "reference_audio_base64": "reference_audio_path"}
)
"""Field with audio in the request itself -> the field with its address, which counts where both are given."""
INSTRUMENTAL: Final = "[Instrumental]"
"""Lyrics of a song without any, as ACE-Step's models were trained."""


class LoraChoice(BaseModel):
    """A LoRA for this request alone, added to the DiT's weights ``scale`` times."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="LoraChoice")

    path: Annotated[str, BeforeValidator(coerce.lora_path)] = Field(
        max_length=1_024,
        description="Safetensors: s3://bucket/key.safetensors, s3://bucket/folder/, or a name in the checkpoint "
        "folder's loras/.",
    )
    scale: Real = Field(default=1.0, ge=-4, le=4, description="Strength; 1 is as it was trained.")
    alpha: OptionalReal = Field(
        default=None,
        description="Alpha that the LoRA was trained with, if its file does not say it (PEFT without configuration).",
    )


class GenerationRequest(BaseModel):
    """One request for one or more songs, in ACE-Step's own field names.

    None, and an empty text or list, mean "not given". Times are seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", title="GenerationRequest")

    task_id: Name = Field(
        default=None,
        pattern=TASK_ID_PATTERN,
        description="Idempotency key; by default the message id, else the worker makes one up.",
    )
    task_type: Annotated[TaskType, _Word] = Field(
        default="text2music", description="Task; turbo models do text2music, repaint, cover and cover-nofsq."
    )
    model: Name = Field(default=None, max_length=256, description="The DiT model; by default the worker's primary one.")
    lora: Annotated[LoraChoice | None, BeforeValidator(coerce.lora)] = Field(
        default=None, description="A LoRA to apply: an object of path and scale, or the path alone."
    )
    loras: Annotated[tuple[LoraChoice, ...], BeforeValidator(coerce.loras)] = Field(
        default=(),
        max_length=_MAX_LORAS,
        description="Several LoRAs, each as in lora. Their changes to the model's weights are added up, after that of "
        "lora.",
    )
    on_limit: Annotated[Literal["clamp", "reject"], _Word] = Field(
        default="clamp", description="Over the GPU tier's limit: clamp to it and report that, or reject the request."
    )
    on_model_unavailable: Annotated[Literal["fallback", "fail"], _Word] = Field(
        default="fallback", description="Model not loaded: use the primary one and report that, or fail."
    )

    strict: Flag = Field(
        default=False,
        description="Reject values that cannot be read or are out of range, in place of using what ACE-Step would.",
    )

    queue_deadline_s: Seconds = Field(
        default=None,
        le=7 * _DAY,
        description="Seconds it may wait in the queue, by the message's timestamp, before it expires. "
        "0 or none: no limit.",
    )

    prompt: Text = Field(default="", max_length=8_192, description="Description of the music.")
    lyrics: Text = Field(
        default="", max_length=32_768, description="Lyrics. None, [inst] and [instrumental] mean instrumental."
    )
    instrumental: Flag = Field(default=False, description="Sing nothing, whatever lyrics says.")
    vocal_language: Annotated[str, BeforeValidator(coerce.vocal_language)] = Field(
        default="en",
        max_length=128,
        json_schema_extra={"examples": list(coerce.LANGUAGES)},
        description="Language of the lyrics, a code such as en; other text goes into the prompt as it is.",
    )
    bpm: Count = Field(
        default=None,
        le=10_000,
        description="Beats per minute; they go into the prompt as they are, and the model was trained on 30 to 300.",
    )
    key_scale: Name = Field(
        default=None, max_length=128, description="Key, such as C major or F# minor; it goes into the prompt as it is."
    )
    time_signature: Name = Field(
        default=None,
        max_length=128,
        description="Time signature: 2 is 2/4, 3 is 3/4, 4 is 4/4, 6 is 6/8; it goes into the prompt as it is.",
    )
    audio_duration: Seconds = Field(
        default=None, le=_DAY, description="Seconds of music, up to 600 on the largest tier. 0 means not given."
    )
    batch_size: Integer = Field(default=1, ge=1, le=1_000, description="Songs in this request, 1 to 8.")
    candidates: CountOrOff = Field(
        default=None,
        le=1_000,
        description="Songs to make and score, in place of batch_size; the best are kept. 0 or none: no scores.",
    )
    keep: Integer = Field(default=1, ge=1, le=1_000, description="How many of the candidates are kept, best first.")
    seed: Annotated[tuple[Seed, ...], BeforeValidator(coerce.seeds)] = Field(
        default=(), max_length=1_000, description="A seed per song; -1, or none for a song, is random."
    )
    use_random_seed: Flag = Field(
        default_factory=lambda found: not found["seed"],
        description="Draw the seeds. True unless a seed is given: a given seed is honoured.",
    )

    inference_steps: Integer = Field(default=8, ge=1, le=1_000, description="Denoising steps.")
    guidance_scale: Real = Field(
        default=7.0, ge=0, le=100, description="Classifier-free guidance of the DiT; turbo models have theirs built in."
    )
    # Below, the diffusion times and the penalised probabilities are no longer finite in float32.
    shift: Real = Field(default=3.0, ge=0.001, le=10, description="Shift of the diffusion times.")
    timesteps: Annotated[tuple[float, ...] | None, BeforeValidator(coerce.optional(coerce.timesteps))] = Field(
        default=None, max_length=200, description="Diffusion times from 1 down to 0, in place of steps and shift."
    )
    infer_method: Annotated[Literal["ode", "sde"], _Word] = Field(
        default="ode", description="Sampler: ode is deterministic, sde adds noise at each step."
    )
    sampler_mode: Annotated[Literal["euler", "heun"], _Word] = Field(
        default="euler", description="ODE sampler; heun takes twice as long a step."
    )
    velocity_norm_threshold: Real = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Largest norm of a velocity, in norms of the latents; 0: no limit.",
    )
    velocity_ema_factor: Real = Field(
        default=0.0, ge=0, le=1, description="Weight of the velocity of the step before; 0: no smoothing."
    )
    use_adg: Flag = Field(
        default=False, description="Adaptive dual guidance, by angles, in place of APG; for base and SFT models."
    )
    cfg_interval_start: Real = Field(
        default=0.0, ge=0, le=1, description="Lowest diffusion time (0: song) with guidance."
    )
    cfg_interval_end: Real = Field(
        default=1.0, ge=0, le=1, description="Highest diffusion time (1: noise) with guidance."
    )
    dcw_enabled: OptionalFlag = Field(
        default=None, description="Correct each step in wavelet bands (DCW); none: for turbo models only."
    )
    dcw_mode: Annotated[Literal["double", "low", "high", "pix"], _Word] = Field(
        default="double", description="Bands that DCW corrects; pix: the latents without a transform."
    )
    dcw_scaler: Real = Field(
        default=0.05, ge=-1, le=1, description="Strength of DCW; of the low band where both are corrected."
    )
    dcw_high_scaler: Real = Field(
        default=0.02, ge=-1, le=1, description="Strength of DCW in the high band where both are corrected."
    )
    dcw_wavelet: Annotated[str, _Word] = Field(
        default="haar", pattern=WAVELET_PATTERN, description="Wavelet of DCW, as PyWavelets names it."
    )
    retake_seed: Annotated[Seed | None, BeforeValidator(coerce.optional(coerce.integer))] = Field(
        default=None, description="Seed of the noise that retake_variance mixes in; -1 or none is random."
    )
    retake_variance: Real = Field(
        default=0.0, ge=0, le=1, description="Variation of a song: how much of its noise is that of retake_seed."
    )
    noise: Annotated[Literal["cpu", "device"], _Word] = Field(
        default="cpu",
        description="Where noise is drawn. cpu: the same on every card; device: nearly as ACE-Step's server does.",
    )
    latent_rescale: Real = Field(default=1.0, ge=-100, le=100, description="Factor of the final latents.")
    latent_shift: Real = Field(default=0.0, ge=-10, le=10, description="Added to the final latents, after the factor.")
    use_tiled_decode: Flag = Field(default=True, description="Decode in tiles: much less memory, the same sound.")
    audio_format: Annotated[AudioFormat, _Word] = Field(
        default="mp3", description="File format; wav32 is 32-bit float, ogg and opus both mean Ogg/Opus."
    )
    mp3_bitrate: Annotated[Literal["128k", "192k", "256k", "320k"], _Word] = Field(
        default="192k", description="Bits a second of an MP3 file."
    )
    mp3_sample_rate: Annotated[Literal[44_100, 48_000], BeforeValidator(coerce.integer)] = Field(
        default=48_000, description="Sample rate of an MP3 file in Hz."
    )
    fade_in_duration: Real = Field(default=0.0, ge=0, le=_DAY, description="Seconds of a linear fade-in.")
    fade_out_duration: Real = Field(default=0.0, ge=0, le=_DAY, description="Seconds of a linear fade-out.")
    enable_normalization: Flag = Field(
        default=True, description="Scale each song so that its peak is at normalization_db."
    )
    normalization_db: Real = Field(
        default=-1.0, ge=-100, le=100, description="Peak of a song in dB of full scale; above 0 there is no scaling."
    )

    loudness_lufs: Level = Field(
        default=None,
        ge=-70,
        le=-5,
        description="Integrated loudness (EBU R 128) to bring each song to, such as -14 LUFS. "
        "0 or none: its level stays.",
    )
    true_peak_db: Real = Field(
        default=-1.0,
        ge=-20,
        le=0,
        description="True peak in dB of full scale that loudness_lufs must not bring a song above.",
    )
    timestamps: Flag = Field(
        default=False,
        description="Find when each line of the lyrics is sung: audios[].lyrics, and .lrc and .vtt files.",
    )

    src_audio_path: Place = Field(
        default=None, max_length=2_048, description="Audio to cover, repaint or work on: s3://bucket/key or https://."
    )
    reference_audio_path: Place = Field(
        default=None, max_length=2_048, description="Audio whose timbre is followed: s3://bucket/key or https://."
    )
    # Not part of what is published, stored or sent to the engines: these get the file that it is decoded into.
    src_audio_base64: Embedded = Field(
        default=None,
        exclude=True,
        repr=False,
        max_length=MAX_BASE64_CHARACTERS,
        description="The audio of src_audio_path itself, a small file in Base64; a data: URL is read too.",
    )
    reference_audio_base64: Embedded = Field(
        default=None,
        exclude=True,
        repr=False,
        max_length=MAX_BASE64_CHARACTERS,
        description="The audio of reference_audio_path itself, likewise.",
    )
    source_task_id: Name = Field(
        default=None,
        pattern=TASK_ID_PATTERN,
        description="Task whose song is worked on, in place of src_audio_path: a result of this product, by its id.",
    )
    source_index: Integer = Field(
        default=0, ge=0, le=1_000, description="Which song of source_task_id, counted from 0."
    )
    extend_left_s: SecondsOrOff = Field(
        default=None,
        le=_DAY,
        description="Seconds to add before the source: a repaint that begins before it. 0 or none: nothing.",
    )
    extend_right_s: SecondsOrOff = Field(
        default=None,
        le=_DAY,
        description="Seconds to add after the source: a repaint that ends past it. 0 or none: nothing.",
    )
    replace_lines: Annotated[Mapping[str, str] | None, BeforeValidator(coerce.optional(coerce.replaced_lines))] = Field(
        default=None,
        max_length=64,
        description="Lines of source_task_id to sing anew: old line to new one, or section and lyrics.",
    )
    variation: OptionalReal = Field(
        default=None,
        ge=0,
        le=1,
        description="Make the song of source_task_id again with another noise: 0 is the same song, 1 another one.",
    )
    stems: Flag = Field(
        default=False,
        description="Extract every track of the source, or those of track_classes: a song each; for base models.",
    )
    quality: Annotated[Literal["draft", "final"] | None, BeforeValidator(coerce.optional(coerce.word))] = Field(
        default=None,
        description="Steps for a quick draft, or for a finished song; final with source_task_id finishes that draft.",
    )
    repainting_start: Real = Field(
        default=0.0,
        ge=-_DAY,
        le=_DAY,
        description="Where the repainted part begins, in seconds; below 0 the song is extended to the left.",
    )
    repainting_end: Seconds = Field(
        default=None,
        le=_DAY,
        description="Where it ends, in seconds; 0, -1 or none: with the audio; past that the song gets longer.",
    )
    repaint_mode: Annotated[Literal["conservative", "balanced", "aggressive"], _Word] = Field(
        default="balanced",
        description="How much of the song around a repainted part is kept; balanced: by repaint_strength.",
    )
    repaint_strength: Real = Field(
        default=0.5, ge=0, le=1, description="Freedom of a balanced repaint; 0 keeps as much as conservative."
    )
    repaint_latent_crossfade_frames: CrossfadeFrames = Field(
        default=None,
        le=15_000,
        description="Cross-fade around a repainted part in latent frames, 25 a second; none: the mode's.",
    )
    repaint_wav_crossfade_sec: CrossfadeSeconds = Field(
        default=None,
        le=600,
        description="Cross-fade around a repainted part in seconds of samples; none: the mode's.",
    )
    chunk_mask_mode: Annotated[Literal["auto", "explicit"], _Word] = Field(
        default="auto",
        description="Whether the model is shown the part to make of a repaint or lego (explicit) or not (auto).",
    )
    audio_cover_strength: Real = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the steps that follow source or codes; the rest follow the text alone.",
    )
    no_fsq: Flag = Field(
        default=False, description="Cover from the source itself, not from its codes: task_type cover-nofsq."
    )
    cover_noise_strength: Real = Field(
        default=0.0, ge=0, le=1, description="How far a cover starts from its source in place of noise."
    )
    flow_edit_morph: Flag = Field(
        default=False, description="Turn the source into the song by flow edit: text2music with a source, or cover."
    )
    flow_edit_source_caption: Text = Field(
        default="", max_length=8_192, description="Description of the source of a flow edit."
    )
    flow_edit_source_lyrics: Text = Field(
        default="", max_length=32_768, description="Lyrics of the source of a flow edit."
    )
    flow_edit_n_min: Real = Field(
        default=0.0, ge=0, le=1, description="Share of the steps, from the first, that a flow edit leaves out."
    )
    flow_edit_n_max: Real = Field(
        default=1.0, ge=0, le=1, description="Share of the steps after which a flow edit goes on as a plain song."
    )
    flow_edit_n_avg: Integer = Field(default=1, ge=1, le=16, description="Noises a step that a flow edit averages.")
    audio_code_string: Annotated[str, BeforeValidator(coerce.audio_codes)] = Field(
        default="", max_length=256 * 1024, description="Semantic audio codes to render, in place of the LM's."
    )
    instruction: OptionalText = Field(
        default=None, max_length=2_048, description="Instruction to the model; each task type has its own."
    )
    global_caption: Text = Field(
        default="",
        max_length=8_192,
        description="Description of the whole song, for models that take one beside prompt.",
    )
    track_name: Name = Field(default=None, max_length=128, description="Track to extract or to add.")
    track_classes: Annotated[tuple[Annotated[str, Field(max_length=128)], ...], BeforeValidator(coerce.names)] = Field(
        default=(), max_length=64, description="Tracks to complete the music with."
    )

    thinking: Flag = Field(default=False, description="Let the LM write audio codes for the DiT to render.")
    sample_mode: Flag = Field(default=False, description="Let the LM write prompt, lyrics and metadata.")
    sample_query: Text = Field(default="", max_length=8_192, description="Subject for sample mode.")
    use_format: Flag = Field(default=False, description="Let the LM rewrite prompt and lyrics.")
    analysis_only: Flag = Field(default=False, description="Return metadata, no audio.")
    full_analysis_only: Flag = Field(default=False, description="Describe the source audio, no new audio.")
    extract_codes_only: Flag = Field(
        default=False, description="Return the audio codes of the source audio, no new audio."
    )
    use_cot_metas: Flag = Field(
        default=True, description="Let the LM, when there is one, write the tempo, key and length that are not given."
    )
    use_cot_caption: Flag = Field(default=True, description="Let the LM, when there is one, refine the prompt.")
    use_cot_language: Flag = Field(
        default=True,
        description="Let the LM, when there is one, name a language in its thoughts; the song's is vocal_language.",
    )
    is_format_caption: Flag = Field(default=False, description="The prompt has been rewritten already.")
    constrained_decoding: Flag = Field(default=True, description="Hold the LM's metadata to its grammar.")
    constrained_decoding_debug: Flag = Field(default=False, description="Log the constrained decoding.")
    allow_lm_batch: Flag = Field(default=True, description="Let the LM work on all songs of the request at once.")
    lm_model_path: Name = Field(default=None, max_length=2_048, description="The 5Hz LM; by default the worker's.")
    lm_backend: Annotated[Literal["vllm", "pt"] | None, BeforeValidator(coerce.optional(coerce.lm_backend))] = Field(
        default=None, description="Backend of the LM; by default the worker's."
    )
    lm_temperature: Real = Field(default=0.85, ge=0, le=5, description="Sampling temperature of the LM.")
    lm_cfg_scale: Real = Field(
        default=2.5, ge=0, le=30, description="Guidance of the LM's audio codes; 1 and below is off."
    )
    lm_top_k: Integer = Field(default=0, ge=0, le=1_000_000, description="Sample among the k likeliest; 0 is off.")
    lm_top_p: Real = Field(default=0.9, gt=0, le=1, description="Sample among the likeliest of this mass; 1 is off.")
    lm_repetition_penalty: Real = Field(
        default=1.0,
        ge=0.001,
        le=10,
        description="Accepted without effect, as by ACE-Step: there is no penalty on repetition.",
    )
    lm_negative_prompt: Text = Field(
        default="NO USER INPUT", max_length=8_192, description="Prompt that the LM is guided away from."
    )

    @property
    def all_loras(self) -> tuple[LoraChoice, ...]:
        """The LoRAs of the fields lora and loras, in this order."""
        return self.loras if self.lora is None else (self.lora, *self.loras)

    @property
    def is_instrumental(self) -> bool:
        """Whether the song has no vocals."""
        return self.instrumental or self.lyrics.strip().lower() in ("", "[inst]", "[instrumental]")

    @property
    def has_source(self) -> bool:
        """Whether source audio is given: by its address, in the request itself, or as a song of an earlier task."""
        return bool(self.src_audio_path or self.src_audio_base64 or self.source_task_id)


class FieldProblem(BaseModel):
    """One field that breaks a rule. ``value`` is at most 100 characters of what was sent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str
    value: str
    rule: str


def problems_text(problems: Iterable[FieldProblem]) -> str:
    """Return the message of an error that has these problems."""
    return "; ".join(f"{p.field} = {p.value}: {p.rule}" for p in problems)


class RequestInvalid(ValueError):
    """The body breaks one or more rules; ``problems`` names all of them."""

    def __init__(self, problems: tuple[FieldProblem, ...]) -> None:
        super().__init__(problems_text(problems))
        self.problems = problems


_FIELDS: Final = GenerationRequest.model_fields
_NAMES: Final = {field: (field, *ALIASES.get(field, ())) for field in _FIELDS}
_LOOKED_UP: Final = FieldNames(_NAMES)
_ALL_NAMES: Final = frozenset(_LOOKED_UP.owners)
_FLAGS: Final = tuple(name for name, field in _FIELDS.items() if field.annotation is bool)
_INTERVALS: Final = (
    ("cfg_interval_start", "cfg_interval_end", "no step is guided"),
    ("flow_edit_n_min", "flow_edit_n_max", "no step is edited"),
)
_OUTRANKED_BY_SONG: Final = frozenset({"src_audio_path", "src_audio_base64"})
_ROUNDS: Final = 2
_LISTS: Final = ("seed", "timesteps", "track_classes", "audio_code_string", "loras")
_RULES: Final[dict[str, str]] = {
    "extra_forbidden": "is not one of its fields",
    "greater_than": "must be above {gt:,}",
    "greater_than_equal": "must be at least {ge:,}",
    "less_than_equal": "must be at most {le:,}",
    "literal_error": "must be {expected}",
    "missing": "must be given",
    "model_type": "must be an object of path and scale, or the path alone",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_long": "must have at most {max_length:,} characters",
    "string_unicode": "must be valid Unicode, without lone surrogates",
    "too_long": "must have at most {max_length:,} entries",
    "value_error": "{error}",
}


def parse_request(
    body: Mapping[str, object], *, strict: bool = False, defaults: Mapping[str, object] = MappingProxyType({})
) -> tuple[GenerationRequest, tuple[str, ...]]:
    """Parse a body with ACE-Step's aliases, nesting and coercions. Returns the request and warnings.

    A field is looked up in the body, then in ``param_obj``, then in the first of ``metas``, ``meta``, ``metadata``,
    ``user_metadata`` and ``userMetadata``, each time by its own name and then by its aliases. None counts as not given,
    and blank text too, but ends the search.

    Args:
        body: the fields.
        strict: reject every value that breaks a rule, even if the request does not ask for that with ``strict``. By
            default such a value is replaced with the one that ACE-Step would use, and a warning says so.
        defaults: of fields that the operator has set; the body outranks them.

    Raises:
        RequestInvalid: with every field that breaks a rule, not the first alone.
    """
    lookup = Lookup(body, _LOOKED_UP)
    given = {field: hits[0] for field, hits in lookup.hits.items() if not blank(hits[0].value)}
    reading = _Reading(given, strict=strict or _asks_for_strict(given))
    for part in lookup.broken:
        reading.judge(FieldProblem(field=part.field, value=shown(part.value), rule=part.rule), "it is ignored")
    request = reading.request(defaults)
    settled, seed_warnings = _settle_seed(request, given)
    settled, other_warnings = _settle_others(settled, given)
    warnings = (*lookup.warnings(), *reading.warnings, *_rereadings(given), *seed_warnings, *other_warnings)
    return settled, warnings


def _asks_for_strict(given: Mapping[str, Found]) -> bool:
    try:
        return "strict" in given and coerce.boolean(given["strict"].value)
    except ValueError:
        return False


class _Reading:
    """One body's values on their way into the model. Problems are errors of strict requests, warnings of others."""

    def __init__(self, given: Mapping[str, Found], *, strict: bool) -> None:
        self._given = given
        self._strict = strict
        self._problems: list[FieldProblem] = []
        self._judged: set[str] = set()
        self.warnings: list[str] = []

    def judge(self, problem: FieldProblem, used: str) -> None:
        """Note a problem, and what is done where the request is not strict."""
        self._judged.add(problem.field)
        if self._strict:
            self._problems.append(problem)
        else:
            self.warnings.append(f"'{problem.field}' = {problem.value}: {problem.rule}; {used}")

    def request(self, defaults: Mapping[str, object]) -> GenerationRequest:
        """Return the request. Raises ``RequestInvalid``."""
        values = dict(defaults) | {field: found.value for field, found in self._given.items()}
        try:
            request = GenerationRequest.model_validate(values)
        except ValidationError as error:
            request = self._replaced(values, error)
        if defaults:
            # What the operator has set, the producer has not given.
            given = request.model_fields_set - (defaults.keys() - self._given.keys())
            request = GenerationRequest.model_construct(_fields_set=given, **dict(request))
        for problem, used in _musical_problems(request, self._given):
            if problem.field not in self._judged:
                self.judge(problem, used)
        if self._problems:
            raise RequestInvalid(tuple(self._problems))
        return request

    def _replaced(self, values: dict[str, object], error: ValidationError) -> GenerationRequest:
        """Return the request with what ACE-Step would use in place of the wrong values."""
        for _ in range(_ROUNDS):
            self._replace(values, error)
            try:
                return GenerationRequest.model_validate(values)
            except ValidationError as again:  # a replacement breaks a rule too
                error = again
        raise RequestInvalid((*self._problems, *(problem for problem, _ in _problems(error, self._given))))

    def _replace(self, values: dict[str, object], error: ValidationError) -> None:
        for problem, detail in _problems(error, self._given):
            if self._strict or problem.field in lenient.NOT_REPLACED:
                self._problems.append(problem)
                del values[problem.field]
                continue
            new = lenient.replacement(problem.field, values[problem.field], detail["type"], detail.get("ctx", {}))
            if new is lenient.DEFAULT:
                del values[problem.field]
                self.judge(problem, "the default is used")
            else:
                values[problem.field] = new
                used = "its beginning" if "too_long" in detail["type"] else shown(new)
                self.judge(problem, f"{used} is used")


def _musical_problems(request: GenerationRequest, given: Mapping[str, Found]) -> Iterator[tuple[FieldProblem, str]]:
    """Yield what a strict request must not have and ACE-Step uses as it is."""
    as_it_is = "it goes into the prompt as it is"
    if request.vocal_language not in coerce.LANGUAGES and "vocal_language" in given:
        yield _problem("vocal_language", given["vocal_language"], "must be a language code, such as en"), as_it_is
    for field, read in (("key_scale", coerce.key_scale), ("time_signature", coerce.time_signature)):
        value = getattr(request, field)
        try:
            if value is not None:
                read(value)
        except ValueError as error:
            yield _problem(field, given[field], str(error)), as_it_is
    yield from _candidate_problems(request, given)
    for start, end, used in _INTERVALS:
        if getattr(request, end) < getattr(request, start):
            field = end if end in given else start
            yield _problem(field, given[field], f"{end} must not be below {start}"), used
    if request.source_task_id is not None:
        for field in sorted(_OUTRANKED_BY_SONG & given.keys()):
            yield _problem(field, given[field], "source_task_id is given, too, and outranks it"), "it is ignored"
    end_s = request.repainting_end if request.task_type in WINDOWED_TASKS else None
    if end_s is not None and end_s <= request.repainting_start:
        rule = "repainting_end must be after repainting_start"
        yield _problem("repainting_end", given["repainting_end"], rule), "the whole song is made anew"


def _candidate_problems(request: GenerationRequest, given: Mapping[str, Found]) -> Iterator[tuple[FieldProblem, str]]:
    """Yield numbers of songs that contradict each other."""
    count = request.candidates
    if count is None:
        if request.keep > 1:
            yield _problem("keep", given["keep"], "needs candidates: how many songs it is the best of"), "it is ignored"
        return
    if "batch_size" in given and request.batch_size != count:
        rule = "must not be given beside candidates, which says how many are made"
        yield _problem("batch_size", given["batch_size"], rule), "it is ignored"
    if request.keep > count:
        yield _problem("keep", given["keep"], f"must be at most candidates, {count}"), f"{count} is used"


def read_task_id(body: Mapping[str, object]) -> str | None:
    """Return the task id of a body that may be invalid otherwise; None: it has no valid one."""
    own = body.get("task_id")
    if not (isinstance(own, str) and own):  # else nothing outranks it, and a look-up of all fields takes its time
        hits = Lookup(body, _LOOKED_UP).hits.get("task_id")
        own = hits[0].value if hits else ""
    try:
        written = coerce.trimmed(own)
    except ValueError:
        return None
    return written if is_task_id(written) else None


def is_task_id(text: str) -> bool:
    """Whether a text can be a task's id, and so a folder of its own."""
    return re.fullmatch(TASK_ID_PATTERN, text) is not None


def list_names() -> frozenset[str]:
    """Return the names of the fields that may have a list, aliases too."""
    return frozenset(name for field in _LISTS for name in _NAMES[field])


def field_names() -> frozenset[str]:
    """Return the names of all fields, aliases too."""
    return _ALL_NAMES


def request_json_schema() -> dict[str, Any]:
    """Return the canonical request as JSON Schema (draft 2020-12); ``x-aliases`` holds the other names of a field."""
    schema = GenerationRequest.model_json_schema()
    add_aliases(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def add_aliases(schema: dict[str, Any]) -> None:
    """Add ``x-aliases`` to the properties of the request's schema."""
    for field, aliases in ALIASES.items():
        schema["properties"][field]["x-aliases"] = list(aliases)


def _problems(exc: ValidationError, given: Mapping[str, Found]) -> Iterator[tuple[FieldProblem, ErrorDetails]]:
    """Yield one problem per field, in this module's words, and its details; of several errors in a list the first."""
    seen: set[str] = set()
    for error in exc.errors(include_url=False):
        field = str(error["loc"][0])
        if error["type"] != "default_factory_not_called" and field not in seen:  # follows from another field's problem
            seen.add(field)
            yield _problem(field, given[field], _inner_name(error) + _rule(error)), error


def _inner_name(error: ErrorDetails) -> str:
    """Return the name of the part that is wrong, where a field has named parts."""
    parts = error["loc"][1:3]
    return f"{shown('.'.join(map(str, parts)))} " if any(isinstance(part, str) for part in parts) else ""


def _rule(error: ErrorDetails) -> str:
    """Return the rule with its bounds, or pydantic's text for an error that the table does not have."""
    if error["type"] not in _RULES:
        return error["msg"]
    return _RULES[error["type"]].format(**{name: _plain(bound) for name, bound in error.get("ctx", {}).items()})


def _plain(bound: object) -> object:
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _problem(field: str, found: Found, rule: str) -> FieldProblem:
    where = "" if found.path == field else f" (written as {found.path})"
    value = found.value
    embedded = field in EMBEDDED_AUDIO and isinstance(value, str)
    return FieldProblem(
        field=field, value=f"{len(str(value)):,} characters" if embedded else shown(value), rule=rule + where
    )


def _settle_seed(request: GenerationRequest, given: Mapping[str, Found]) -> tuple[GenerationRequest, tuple[str, ...]]:
    """Make ``use_random_seed`` and ``seed`` agree: random exactly when there is no seed."""
    if request.use_random_seed and request.seed:
        path = given["use_random_seed"].path
        return request.model_copy(update={"seed": ()}), (f"'seed' is ignored because {path!r} is true",)
    if not request.use_random_seed and not request.seed:
        path = given["use_random_seed"].path
        warning = f"{path!r} is false but no seed is given: one is drawn and reported"
        return request.model_copy(update={"use_random_seed": True}), (warning,)
    return request, ()


def _settle_others(request: GenerationRequest, given: Mapping[str, Found]) -> tuple[GenerationRequest, tuple[str, ...]]:
    """Apply the fields that say the same as a value of another field."""
    changes: dict[str, object] = {}
    warnings: list[str] = []
    if request.instrumental and not request.lyrics.strip():
        changes["lyrics"] = INSTRUMENTAL
    elif request.instrumental and request.lyrics.strip().lower() not in ("[inst]", "[instrumental]"):
        changes["lyrics"] = INSTRUMENTAL
        warnings.append("'lyrics' is ignored because 'instrumental' is true")
    if request.candidates is not None:
        changes |= {"batch_size": request.candidates, "keep": min(request.keep, request.candidates)}
    elif request.keep > 1:
        changes["keep"] = 1
    if request.no_fsq and request.task_type == "cover":
        changes["task_type"] = "cover-nofsq"
    if request.source_task_id is not None:
        changes |= {name: None for name in _OUTRANKED_BY_SONG if getattr(request, name) is not None}
        request = request.model_copy(update=changes)
    for field, address in EMBEDDED_AUDIO.items():
        if getattr(request, field) and getattr(request, address):
            changes[field] = None
            warnings.append(f"{given[field].path!r} is ignored: {given[address].path!r} outranks it")
    return (request.model_copy(update=changes), tuple(warnings)) if changes else (request, ())


def _rereadings(given: Mapping[str, Found]) -> Iterator[str]:
    """Yield warnings about values that were read as something else than they say."""
    for flag in _FLAGS:
        if flag in given and isinstance(given[flag].value, str):
            yield from _odd_flag(given[flag])
    if "lm_backend" in given and coerce.word(given["lm_backend"].value) == "mlx":
        yield "LM backend 'mlx' is not supported: 'pt' is used"


def _odd_flag(found: Found) -> Iterator[str]:
    written = coerce.word(found.value)
    if written not in coerce.TRUE_WORDS | coerce.FALSE_WORDS:
        hint = "; the file format is 'audio_format'" if written in get_args(AudioFormat) else ""
        yield f"{found.path!r} is {shown(found.value)!r}, which is read as false{hint}"
