# SPDX-License-Identifier: Apache-2.0
"""The request as a ``TypedDict``, for editors and type checkers. Readers of requests use ``request`` instead.

The fields of ``RequestBody`` are generated from ``GenerationRequest``: names, types and descriptions are the same.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Required, TypedDict

from acestep_schemas.request import AudioFormat, TaskType


class LoraBody(TypedDict, total=False):
    """A LoRA for one request."""

    path: Required[str]
    """Safetensors: s3://bucket/key.safetensors, s3://bucket/folder/, or a name in the checkpoint folder's loras/."""
    scale: float
    """Strength; 1 is as it was trained."""
    alpha: float | None
    """Alpha that the LoRA was trained with, if its file does not say it (PEFT without configuration)."""


class RequestBody(TypedDict, total=False):
    """The body of a request, in ACE-Step's own field names. No field is required. Times are seconds.

    Values may be looser than these types: numbers as text, a list as comma-separated text, more aliases. A plain
    mapping is accepted wherever this is.
    """

    # Fields of GenerationRequest, written by `bash infra/dev fix`.
    task_id: str | None
    """Idempotency key; by default the message id, else the worker makes one up."""
    task_type: TaskType
    """Task; turbo models do text2music, repaint, cover and cover-nofsq."""
    model: str | None
    """The DiT model; by default the worker's primary one."""
    lora: LoraBody | str | None
    """A LoRA to apply: an object of path and scale, or the path alone."""
    loras: Sequence[LoraBody | str]
    """Several LoRAs, each as in lora. Their changes to the model's weights are added up, after that of lora."""
    on_limit: Literal["clamp", "reject"]
    """Over the GPU tier's limit: clamp to it and report that, or reject the request."""
    on_model_unavailable: Literal["fallback", "fail"]
    """Model not loaded: use the primary one and report that, or fail."""
    strict: bool
    """Reject values that cannot be read or are out of range, in place of using what ACE-Step would."""
    queue_deadline_s: float | None
    """Seconds it may wait in the queue, by the message's timestamp, before it expires. 0 or none: no limit."""
    prompt: str
    """Description of the music."""
    lyrics: str
    """Lyrics. None, [inst] and [instrumental] mean instrumental."""
    instrumental: bool
    """Sing nothing, whatever lyrics says."""
    vocal_language: str
    """Language of the lyrics, a code such as en; other text goes into the prompt as it is."""
    bpm: int | None
    """Beats per minute; they go into the prompt as they are, and the model was trained on 30 to 300."""
    key_scale: str | None
    """Key, such as C major or F# minor; it goes into the prompt as it is."""
    time_signature: str | None
    """Time signature: 2 is 2/4, 3 is 3/4, 4 is 4/4, 6 is 6/8; it goes into the prompt as it is."""
    audio_duration: float | None
    """Seconds of music, up to 600 on the largest tier. 0 means not given."""
    batch_size: int
    """Songs in this request, 1 to 8."""
    candidates: int | None
    """Songs to make and score, in place of batch_size; the best are kept. 0 or none: no scores."""
    keep: int
    """How many of the candidates are kept, best first."""
    seed: int | Sequence[int]
    """A seed per song; -1, or none for a song, is random."""
    use_random_seed: bool
    """Draw the seeds. True unless a seed is given: a given seed is honoured."""
    inference_steps: int
    """Denoising steps."""
    guidance_scale: float
    """Classifier-free guidance of the DiT; turbo models have theirs built in."""
    shift: float
    """Shift of the diffusion times."""
    timesteps: Sequence[float] | None
    """Diffusion times from 1 down to 0, in place of steps and shift."""
    infer_method: Literal["ode", "sde"]
    """Sampler: ode is deterministic, sde adds noise at each step."""
    sampler_mode: Literal["euler", "heun"]
    """ODE sampler; heun takes twice as long a step."""
    velocity_norm_threshold: float
    """Largest norm of a velocity, in norms of the latents; 0: no limit."""
    velocity_ema_factor: float
    """Weight of the velocity of the step before; 0: no smoothing."""
    use_adg: bool
    """Adaptive dual guidance, by angles, in place of APG; for base and SFT models."""
    cfg_interval_start: float
    """Lowest diffusion time (0: song) with guidance."""
    cfg_interval_end: float
    """Highest diffusion time (1: noise) with guidance."""
    dcw_enabled: bool | None
    """Correct each step in wavelet bands (DCW); none: for turbo models only."""
    dcw_mode: Literal["double", "low", "high", "pix"]
    """Bands that DCW corrects; pix: the latents without a transform."""
    dcw_scaler: float
    """Strength of DCW; of the low band where both are corrected."""
    dcw_high_scaler: float
    """Strength of DCW in the high band where both are corrected."""
    dcw_wavelet: str
    """Wavelet of DCW, as PyWavelets names it."""
    retake_seed: int | None
    """Seed of the noise that retake_variance mixes in; -1 or none is random."""
    retake_variance: float
    """Variation of a song: how much of its noise is that of retake_seed."""
    noise: Literal["cpu", "device"]
    """Where noise is drawn. cpu: the same on every card; device: nearly as ACE-Step's server does."""
    latent_rescale: float
    """Factor of the final latents."""
    latent_shift: float
    """Added to the final latents, after the factor."""
    use_tiled_decode: bool
    """Decode in tiles: much less memory, the same sound."""
    audio_format: AudioFormat
    """File format; wav32 is 32-bit float, ogg and opus both mean Ogg/Opus."""
    mp3_bitrate: Literal["128k", "192k", "256k", "320k"]
    """Bits a second of an MP3 file."""
    mp3_sample_rate: Literal[44_100, 48_000]
    """Sample rate of an MP3 file in Hz."""
    fade_in_duration: float
    """Seconds of a linear fade-in."""
    fade_out_duration: float
    """Seconds of a linear fade-out."""
    enable_normalization: bool
    """Scale each song so that its peak is at normalization_db."""
    normalization_db: float
    """Peak of a song in dB of full scale; above 0 there is no scaling."""
    loudness_lufs: float | None
    """Integrated loudness (EBU R 128) to bring each song to, such as -14 LUFS. 0 or none: its level stays."""
    true_peak_db: float
    """True peak in dB of full scale that loudness_lufs must not bring a song above."""
    timestamps: bool
    """Find when each line of the lyrics is sung: audios[].lyrics, and .lrc and .vtt files."""
    src_audio_path: str | None
    """Audio to cover, repaint or work on: s3://bucket/key or https://."""
    reference_audio_path: str | None
    """Audio whose timbre is followed: s3://bucket/key or https://."""
    src_audio_base64: str | None
    """The audio of src_audio_path itself, a small file in Base64; a data: URL is read too."""
    reference_audio_base64: str | None
    """The audio of reference_audio_path itself, likewise."""
    source_task_id: str | None
    """Task whose song is worked on, in place of src_audio_path: a result of this product, by its id."""
    source_index: int
    """Which song of source_task_id, counted from 0."""
    extend_left_s: float | None
    """Seconds to add before the source: a repaint that begins before it. 0 or none: nothing."""
    extend_right_s: float | None
    """Seconds to add after the source: a repaint that ends past it. 0 or none: nothing."""
    replace_lines: Mapping[str, str] | None
    """Lines of source_task_id to sing anew: old line to new one, or section and lyrics."""
    variation: float | None
    """Make the song of source_task_id again with another noise: 0 is the same song, 1 another one."""
    stems: bool
    """Extract every track of the source, or those of track_classes: a song each; for base models."""
    quality: Literal["draft", "final"] | None
    """Steps for a quick draft, or for a finished song; final with source_task_id finishes that draft."""
    repainting_start: float
    """Where the repainted part begins, in seconds; below 0 the song is extended to the left."""
    repainting_end: float | None
    """Where it ends, in seconds; 0, -1 or none: with the audio; past that the song gets longer."""
    repaint_mode: Literal["conservative", "balanced", "aggressive"]
    """How much of the song around a repainted part is kept; balanced: by repaint_strength."""
    repaint_strength: float
    """Freedom of a balanced repaint; 0 keeps as much as conservative."""
    repaint_latent_crossfade_frames: int | None
    """Cross-fade around a repainted part in latent frames, 25 a second; none: the mode's."""
    repaint_wav_crossfade_sec: float | None
    """Cross-fade around a repainted part in seconds of samples; none: the mode's."""
    chunk_mask_mode: Literal["auto", "explicit"]
    """Whether the model is shown the part to make of a repaint or lego (explicit) or not (auto)."""
    audio_cover_strength: float
    """Share of the steps that follow source or codes; the rest follow the text alone."""
    no_fsq: bool
    """Cover from the source itself, not from its codes: task_type cover-nofsq."""
    cover_noise_strength: float
    """How far a cover starts from its source in place of noise."""
    flow_edit_morph: bool
    """Turn the source into the song by flow edit: text2music with a source, or cover."""
    flow_edit_source_caption: str
    """Description of the source of a flow edit."""
    flow_edit_source_lyrics: str
    """Lyrics of the source of a flow edit."""
    flow_edit_n_min: float
    """Share of the steps, from the first, that a flow edit leaves out."""
    flow_edit_n_max: float
    """Share of the steps after which a flow edit goes on as a plain song."""
    flow_edit_n_avg: int
    """Noises a step that a flow edit averages."""
    audio_code_string: str | Sequence[str]
    """Semantic audio codes to render, in place of the LM's."""
    instruction: str | None
    """Instruction to the model; each task type has its own."""
    global_caption: str
    """Description of the whole song, for models that take one beside prompt."""
    track_name: str | None
    """Track to extract or to add."""
    track_classes: Sequence[str]
    """Tracks to complete the music with."""
    thinking: bool
    """Let the LM write audio codes for the DiT to render."""
    sample_mode: bool
    """Let the LM write prompt, lyrics and metadata."""
    sample_query: str
    """Subject for sample mode."""
    use_format: bool
    """Let the LM rewrite prompt and lyrics."""
    analysis_only: bool
    """Return metadata, no audio."""
    full_analysis_only: bool
    """Describe the source audio, no new audio."""
    extract_codes_only: bool
    """Return the audio codes of the source audio, no new audio."""
    use_cot_metas: bool
    """Let the LM, when there is one, write the tempo, key and length that are not given."""
    use_cot_caption: bool
    """Let the LM, when there is one, refine the prompt."""
    use_cot_language: bool
    """Let the LM, when there is one, name a language in its thoughts; the song's is vocal_language."""
    is_format_caption: bool
    """The prompt has been rewritten already."""
    constrained_decoding: bool
    """Hold the LM's metadata to its grammar."""
    constrained_decoding_debug: bool
    """Log the constrained decoding."""
    allow_lm_batch: bool
    """Let the LM work on all songs of the request at once."""
    lm_model_path: str | None
    """The 5Hz LM; by default the worker's."""
    lm_backend: Literal["vllm", "pt"] | None
    """Backend of the LM; by default the worker's."""
    lm_temperature: float
    """Sampling temperature of the LM."""
    lm_cfg_scale: float
    """Guidance of the LM's audio codes; 1 and below is off."""
    lm_top_k: int
    """Sample among the k likeliest; 0 is off."""
    lm_top_p: float
    """Sample among the likeliest of this mass; 1 is off."""
    lm_repetition_penalty: float
    """Accepted without effect, as by ACE-Step: there is no penalty on repetition."""
    lm_negative_prompt: str
    """Prompt that the LM is guided away from."""

    # Aliases that ACE-Step's clients use; the field's own name counts where both are given.
    caption: str
    """Alias of ``prompt``."""
    duration: float | None
    """Alias of ``audio_duration``."""
    language: str
    """Alias of ``vocal_language``."""
    keyscale: str | None
    """Alias of ``key_scale``."""
    keyScale: str | None
    """Alias of ``key_scale``."""
    timesignature: str | None
    """Alias of ``time_signature``."""
    timeSignature: str | None
    """Alias of ``time_signature``."""
    taskType: TaskType
    """Alias of ``task_type``."""

    # Nested objects, in which a field is looked up that the body itself does not have.
    param_obj: Mapping[str, object]
    """Fields by any of their names."""
    metas: Mapping[str, object]
    """Fields by any of their names, looked up after ``param_obj``."""
    metadata: Mapping[str, object]
    """Alias of ``metas``."""
