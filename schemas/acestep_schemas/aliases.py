# SPDX-License-Identifier: Apache-2.0
"""Field names of ACE-Step's clients: aliases, nested objects, and fields that are not supported here."""

from types import MappingProxyType
from typing import Final

# Field -> other spellings, in the order in which they are looked up after the field's own name.
ALIASES: Final = MappingProxyType(
    {
        "prompt": ("caption",),
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
        "use_random_seed": ("useRandomSeed",),
        "reference_audio_path": ("ref_audio_path", "referenceAudioPath", "refAudioPath"),
        "src_audio_path": ("ctx_audio_path", "sourceAudioPath", "srcAudioPath", "ctxAudioPath"),
        "cover_noise_strength": ("coverNoiseStrength",),
        "sampler_mode": ("samplerMode",),
        "velocity_norm_threshold": ("velocityNormThreshold",),
        "velocity_ema_factor": ("velocityEmaFactor",),
        "latent_rescale": ("latentRescale",),
        "latent_shift": ("latentShift",),
        "audio_cover_strength": ("audioCoverStrength", "cover_strength", "coverStrength"),
        "task_type": ("taskType",),
        "track_name": ("trackName",),
        "track_classes": ("trackClasses", "instruments"),
        "audio_code_string": ("audioCodeString", "audio_codes"),
        "infer_method": ("inferMethod",),
        "use_tiled_decode": ("useTiledDecode",),
        "constrained_decoding": ("constrainedDecoding", "constrained"),
        "constrained_decoding_debug": ("constrainedDecodingDebug",),
        "use_cot_caption": ("cot_caption", "cot-caption"),
        "use_cot_language": ("cot_language", "cot-language"),
        "is_format_caption": ("isFormatCaption",),
        "allow_lm_batch": ("allowLmBatch", "parallel_thinking"),
    }
)

# A nested object, or JSON text of one, in which fields are looked up that the body itself does not have ...
PARAM_OBJ: Final = "param_obj"
# ... and after it the first of these that is given.
METAS: Final = ("metas", "meta", "metadata", "user_metadata", "userMetadata")

# Accepted by newer ACE-Step servers, and without effect here. A warning names them.
UNSUPPORTED: Final = frozenset({"ai_token", "eta", "guidance_params", "guidance_variant", "momentum"})
