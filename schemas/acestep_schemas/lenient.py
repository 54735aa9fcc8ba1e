# SPDX-License-Identifier: Apache-2.0
"""Replacements for values that break a rule: the ones that ACE-Step's own server would use, reported as warnings.

Strict requests are rejected instead, and so are values of which no reading makes sense: an unknown task type, a local
path, an id that cannot be one.
"""

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final

from acestep_schemas import coerce


class Default(Enum):
    """The value is dropped, and the field has its default."""

    DEFAULT = "default"


DEFAULT: Final = Default.DEFAULT

NOT_REPLACED: Final = frozenset(
    {
        *("task_id", "task_type", "model", "lora", "loras", "src_audio_path", "reference_audio_path"),
        *("src_audio_base64", "reference_audio_base64"),
        *("on_limit", "on_model_unavailable", "queue_deadline_s"),
        # ACE-Step answers 422 to these.
        *("chunk_mask_mode", "repaint_mode", "repaint_strength", "lm_backend"),
        "audio_code_string",
        *("source_task_id", "source_index", "extend_left_s", "extend_right_s", "replace_lines", "variation", "quality"),
    }
)
"""Fields of which a wrong value is an error in lenient requests too."""


def replacement(field: str, value: object, kind: str, bounds: Mapping[str, Any]) -> object:
    """Return the value to use in place of one that breaks a rule, or ``DEFAULT``.

    Args:
        field: name of the field.
        value: as it was sent.
        kind: pydantic's type of the error.
        bounds: of the rule, as pydantic names them: ``ge``, ``gt``, ``le``, ``max_length``.
    """
    if isinstance(value, bool) and field in _COUNTED:
        return max(int(value), _COUNTED[field])
    if (own := _own_reading(field, value)) is not None:
        return own(value)
    if kind in ("string_too_long", "too_long"):
        return _cut(value, bounds["max_length"])
    if field in _TEXTS:
        return str(value).encode("utf-8", "replace").decode()
    for bound in ("ge", "gt", "le"):
        if bound in bounds:
            return bounds[bound]
    return DEFAULT


def _own_reading(field: str, value: object) -> Callable[[object], object] | None:
    """Return how a value of a field is read that has a way of its own; None: as its rule says."""
    if isinstance(value, str) and field not in _TEXTS and len(value) <= _MAX_NUMBERS:
        plain = coerce.ascii_digits(value)
        if plain != value:
            return lambda _: plain
    return _OWN.get(field)


def _cut(value: object, length: int) -> object:
    if isinstance(value, str | list | tuple):
        return value[:length]
    return DEFAULT


def _positive(smallest: object, largest: object) -> Callable[[object], object]:
    """Return a reading of numbers: ``smallest`` instead of zero and below, ``largest`` instead of what is too much."""

    def read(value: object) -> object:
        try:
            number = coerce.real(value)
        except ValueError:
            return DEFAULT
        if number != int(number):
            return DEFAULT
        return smallest if number <= 0 else largest

    return read


def _shift(value: object) -> object:
    try:
        number = coerce.real(value)
    except ValueError:
        return DEFAULT
    return 1.0 if number <= 0 else min(max(number, 0.001), 10.0)


def _off(value: object, off: object) -> object:
    """Return the value that switches a filter of the LM off, which a number out of range means to do."""
    try:
        coerce.real(value)
    except ValueError:
        return DEFAULT
    return off


_COUNTED: Final = {"bpm": 0, "audio_duration": 0, "batch_size": 1, "candidates": 0, "keep": 1, "inference_steps": 1}
"""Numbers of which true is one, with the smallest."""

_MAX_NUMBERS: Final = 1_000
_TEXTS: Final = frozenset(
    {
        *("prompt", "lyrics", "vocal_language", "key_scale", "time_signature", "instruction", "global_caption"),
        *("sample_query", "track_name", "lm_negative_prompt", "flow_edit_source_caption", "flow_edit_source_lyrics"),
    }
)
"""Fields in which any value is text, as Python writes it. Of half a character, which no encoding has, it is "?"."""

_OWN: Final[Mapping[str, Callable[[object], object]]] = {
    "audio_format": lambda _: "flac",
    "batch_size": _positive(1, 1_000),
    "keep": _positive(1, 1_000),
    "inference_steps": _positive(1, 1_000),
    "lm_top_k": lambda value: _off(value, 0),
    "lm_top_p": lambda value: _off(value, 1.0),
    # The nearest bound would be another loudness than anybody wants: of 14, meant as -14, the loudest.
    "loudness_lufs": lambda _: DEFAULT,
    "seed": lambda _: DEFAULT,
    "shift": _shift,
    "timesteps": lambda _: DEFAULT,
}
