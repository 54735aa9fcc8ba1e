# SPDX-License-Identifier: Apache-2.0
"""A song that nobody hears: the renderer makes one before it is ready, so that the first request finds all at hand."""

from acestep_consumer.engine.renderer.arguments import CODES_PER_SECOND, INSTRUMENTAL, Arguments

_SECONDS = 30
_STEPS = 2


def rehearsal(*, codes: bool) -> Arguments:
    """Return the arguments of a song from text, or from audio codes as the language model writes them."""
    made_from = {"audio_codes": ["<|audio_code_0|>" * CODES_PER_SECOND * _SECONDS]} if codes else {}
    given = {
        "prompt": ["silence"],
        "lyrics": [INSTRUMENTAL],
        "vocal_language": "en",
        "instruction": None,
        "bpm": None,
        "keyscale": None,
        "timesignature": None,
        "task_type": "text2music",
        "track_name": None,
        "complete_track_classes": None,
        "num_inference_steps": _STEPS,
        "shift": 3.0,
        "timesteps": None,
        "guidance_scale": 1.0,
        "cfg_interval_start": 0.0,
        "cfg_interval_end": 1.0,
        "audio_cover_strength": 1.0,
        "reference_audio": None,
        "audio_duration": None if codes else float(_SECONDS),
        **made_from,
    }
    return Arguments(pipeline=given, seeds=(0,), steps=_STEPS, method="ode", tiled=True)
