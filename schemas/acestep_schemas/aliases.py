# SPDX-License-Identifier: Apache-2.0
"""Field names of ACE-Step's clients: aliases, nested objects, and fields that are not supported here."""

from types import MappingProxyType
from typing import Final

# Field -> other spellings, in the order in which they are looked up after the field's own name.
ALIASES: Final = MappingProxyType(
    {
        "prompt": ("caption", "captions"),
        "analysis_only": ("analysisOnly",),
        "full_analysis_only": ("fullAnalysisOnly",),
        "extract_codes_only": ("extractCodesOnly",),
        "sample_mode": ("sampleMode",),
        "sample_query": ("sampleQuery", "description", "desc"),
        "use_format": ("useFormat", "format"),
        "model": ("model_name", "modelName", "dit_model", "ditModel"),
        "key_scale": ("keyscale", "keyScale", "key"),
        "time_signature": ("timesignature", "timeSignature"),
        "audio_duration": ("duration", "audioDuration", "target_duration", "targetDuration"),
        "vocal_language": ("vocalLanguage", "language"),
        "inference_steps": ("inferenceSteps",),
        "guidance_scale": ("guidanceScale",),
        "use_random_seed": ("useRandomSeed", "random_seed_checkbox"),
        "reference_audio_path": ("ref_audio_path", "referenceAudioPath", "refAudioPath", "reference_audio"),
        "src_audio_path": ("ctx_audio_path", "sourceAudioPath", "srcAudioPath", "ctxAudioPath", "src_audio"),
        "src_audio_base64": ("srcAudioBase64", "ctx_audio_base64"),
        "reference_audio_base64": ("referenceAudioBase64", "ref_audio_base64"),
        "source_task_id": ("sourceTaskId",),
        "source_index": ("sourceIndex",),
        "extend_left_s": ("extend_left",),
        "extend_right_s": ("extend_right",),
        "cover_noise_strength": ("coverNoiseStrength",),
        "sampler_mode": ("samplerMode",),
        "velocity_norm_threshold": ("velocityNormThreshold",),
        "velocity_ema_factor": ("velocityEmaFactor",),
        "latent_rescale": ("latentRescale",),
        "latent_shift": ("latentShift",),
        "audio_cover_strength": ("audioCoverStrength", "cover_strength", "coverStrength"),
        "task_type": ("taskType",),
        "track_name": ("trackName",),
        "track_classes": ("trackClasses", "instruments", "complete_track_classes"),
        "audio_code_string": ("audioCodeString", "audio_codes", "text2music_audio_code_string"),
        "infer_method": ("inferMethod",),
        "use_tiled_decode": ("useTiledDecode",),
        "constrained_decoding": ("constrainedDecoding", "constrained", "use_constrained_decoding"),
        "constrained_decoding_debug": ("constrainedDecodingDebug",),
        "use_cot_caption": ("cot_caption", "cot-caption"),
        "use_cot_language": ("cot_language", "cot-language"),
        "is_format_caption": ("isFormatCaption",),
        "allow_lm_batch": ("allowLmBatch", "parallel_thinking"),
        # Of ACE-Step's Python interface and of its web page.
        "seed": ("seeds",),
        "thinking": ("think_checkbox",),
        "timesteps": ("custom_timesteps",),
        "instruction": ("instruction_display_gen",),
        "batch_size": ("batch_size_input",),
        # Of completion interfaces.
        "candidates": ("best_of", "bestOf", "num_candidates"),
    }
)

# A nested object, or JSON text of one, in which fields are looked up that the body itself does not have ...
PARAM_OBJ: Final = "param_obj"
# ... and after it the first of these that is given.
METAS: Final = ("metas", "meta", "metadata", "user_metadata", "userMetadata")

_RESULT = "it is a result of the language model"
_BRANCH = "it is in no release of ACE-Step"
_ALIGNMENT = "timestamps gives lyrics their times and a score, candidates chooses among several songs"

# Names of ACE-Step's interfaces that mean nothing here, and why. A warning says so.
NO_COUNTERPART: Final = MappingProxyType(
    {
        "ai_token": "logins are the broker's",
        "auto_lrc": _ALIGNMENT,
        "auto_score": _ALIGNMENT,
        "cot_bpm": _RESULT,
        "cot_duration": _RESULT,
        "cot_keyscale": _RESULT,
        "cot_lyrics": _RESULT,
        "cot_timesignature": _RESULT,
        "cot_vocal_language": _RESULT,
        "eta": _BRANCH,
        "guidance_params": _BRANCH,
        "guidance_variant": _BRANCH,
        "lm_batch_chunk_size": "the worker batches by the memory that it has",
        "momentum": _BRANCH,
        "save_dir": "songs are stored in S3",
        "score_scale": _ALIGNMENT,
        "use_cot_lyrics": "it has no effect in ACE-Step either",
    }
)
