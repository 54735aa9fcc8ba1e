# SPDX-License-Identifier: Apache-2.0
"""Coerces loose values as ACE-Step's clients write them: numbers as text, `Am` for A minor, `4/4` for 4.

Every function raises ``ValueError`` with the broken rule as its text. Booleans are never numbers.
"""

import binascii
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Final, TypeVar

from acestep_schemas.strict_json import JsonRefused, loads

_T = TypeVar("_T")

TRUE_WORDS: Final = frozenset({"1", "true", "yes", "y", "on"})
FALSE_WORDS: Final = frozenset({"0", "false", "no", "n", "off"})
LANGUAGES: Final = (
    *("ar", "az", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hr", "ht"),
    *("hu", "id", "is", "it", "ja", "ko", "la", "lt", "ms", "ne", "nl", "no", "pa", "pl", "pt", "ro", "ru", "sa"),
    *("sk", "sr", "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "vi", "yue", "zh", "unknown"),
)

_NUMBER: Final = re.compile(r"[+-]?([0-9]{1,400})(\.[0-9]{0,400})?([eE][+-]?[0-9]{1,4})?|[+-]?\.[0-9]{1,400}")
_WHOLE: Final = re.compile(r"[+-]?[0-9]+")
# A lower-case m alone is minor; an upper-case one would mean major to some and minor to others.
# Possessive quantifiers: many spaces cause no backtracking.
_KEY: Final = re.compile(r"([A-Ga-g])\s*+([#b♯♭B])?+\s*+((?i:major|maj|minor|min)|m)")
_TIME_SIGNATURES: Final = {"2": "2", "2/4": "2", "3": "3", "3/4": "3", "4": "4", "4/4": "4", "6": "6", "6/8": "6"}
_SCHEMES: Final = ("s3", "https")
# More than any list field may have: a text of half a million commas is refused before its entries are read.
_MAX_ENTRIES: Final = 1_000
# One component of a path, so that it cannot lead out of its folder.
LORA_NAME: Final = re.compile(r"\w[\w .+-]{0,127}", re.ASCII)
LORA_SUFFIX: Final = ".safetensors"
_LORA_FOLDER: Final = "loras/"
_MAX_DATA_URL_HEAD: Final = 200
_MAX_LINE: Final = 1_024
_MAX_LYRICS: Final = 32_768
_URL_SAFE: Final = re.compile("[-_]")
AUDIO_CODE: Final = re.compile(r"<\|audio_code_([0-9]+)\|>")


def optional(read: Callable[[object], _T]) -> Callable[[object], _T | None]:
    """Return the same coercion, with None for None."""
    return lambda value: None if value is None else read(value)


def text(value: object) -> str:
    """Return text as it is, and a number as its text."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError("must be text")


def trimmed(value: object) -> str:
    """Return text without surrounding whitespace."""
    return text(value).strip()


def word(value: object) -> str:
    """Return a keyword in lower case."""
    return trimmed(value).lower()


def boolean(value: object) -> bool:
    """Return a flag as ACE-Step reads it: 1, true, yes, y and on are true, other text is false."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value == 1
    if isinstance(value, str):
        return word(value) in TRUE_WORDS
    raise ValueError("must be true or false")


def real(value: object) -> float:
    """Return a finite number."""
    try:
        number = float(_number(value))
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


def integer(value: object) -> int:
    """Return a whole number; 120.0 is one."""
    number = _number(value)
    if isinstance(number, float) and not number.is_integer():
        raise ValueError("must be a whole number")
    return int(number)


def positive_integer(value: object) -> int | None:
    """Return a whole number, or None for zero and below, which mean "not given"."""
    number = integer(value)
    return number if number > 0 else None


def positive_real(value: object) -> float | None:
    """Return a finite number, or None for zero and below, which mean "not given"."""
    number = real(value)
    return number if number > 0 else None


def none_for_zero(read: Callable[[object], _T]) -> Callable[[object], _T | None]:
    """Return the same coercion, with None for zero, which switches a field off."""
    return lambda value: read(value) or None


def seeds(value: object) -> tuple[int, ...]:
    """Return one seed per song from a number, comma-separated text or a list; empty when all are -1 (random)."""
    found = _several(value, integer, "must be whole numbers: one, a list, or text with commas between them")
    return () if all(seed == -1 for seed in found) else found


def timesteps(value: object) -> tuple[float, ...] | None:
    """Return strictly falling diffusion times, 1 = noise and 0 = song, from a list or comma-separated text."""
    found = _several(value, real, "must be numbers: a list, or text with commas between them")
    falling = all(earlier > later for earlier, later in pairwise(found))
    if found and not (falling and found[-1] >= 0 and 0 < found[0] <= 1):
        raise ValueError("must fall strictly, from at most 1 to at least 0")
    return found or None


def names(value: object) -> tuple[str, ...]:
    """Return names from a list or comma-separated text, without blank ones."""
    value = _unpacked(value)
    parts = value if isinstance(value, list | tuple) else text(value).split(",")
    return tuple(name for part in _few(parts) if (name := trimmed(part)))


def key_scale(value: object) -> str:
    """Return a key such as "C major", "F# minor" or "B♭ major"; "Am" and "c MAJOR" are understood."""
    match = _KEY.fullmatch(trimmed(value))
    if match is None:
        raise ValueError("must be a key: A to G, then # or b if any, then major or minor")
    note, accidental, mode = match.groups(default="")
    return f"{note.upper()}{accidental.lower()} {'major' if mode.lower().startswith('maj') else 'minor'}"


def time_signature(value: object) -> str:
    """Return beats per bar in the model's form: "2", "3", "4" or "6"; "4/4" and 4 are understood."""
    written = text(value).replace(" ", "").removesuffix(".0")
    if written not in _TIME_SIGNATURES:
        raise ValueError("must be 2, 3, 4 or 6 (or 2/4, 3/4, 4/4, 6/8)")
    return _TIME_SIGNATURES[written]


def language(value: object) -> str:
    """Return a language code that the model was trained on ("en-US" is "en"), else "unknown"."""
    code = vocal_language(value)
    return code if code in LANGUAGES else "unknown"


def vocal_language(value: object) -> str:
    """Return a language code that the model was trained on, or the text as it is: ACE-Step puts it into the prompt."""
    code = re.split("[-_]", word(value))[0]
    return code if code in LANGUAGES else trimmed(value)


def lm_backend(value: object) -> str:
    """Return the LM backend's name: "pt" (PyTorch) for "mlx", which is not supported."""
    return {"mlx": "pt"}.get(word(value), word(value))


def place(value: object) -> str:
    """Return the address of an audio input, which a worker on any machine can read."""
    scheme, mark, rest = trimmed(value).partition("://")
    if scheme.lower() not in _SCHEMES or not rest:
        raise ValueError("must be s3://bucket/key or https://host/path, not a local path")
    return scheme.lower() + mark + rest


def base64_text(value: object) -> str | None:
    """Return a file in Base64 without line breaks and the beginning of a data: URL; None for an empty one."""
    if isinstance(value, str):
        return _base64(value) or None
    raise ValueError("must be text: a file in Base64")


def _base64(value: str) -> str:
    head, comma, rest = value[:_MAX_DATA_URL_HEAD].partition(",")
    if comma and head.lstrip().lower().startswith("data:"):
        if not head.lower().endswith(";base64"):
            raise ValueError("must be a data: URL in Base64")
        value = rest + value[_MAX_DATA_URL_HEAD:]
    written = "".join(value.split())
    try:
        binascii.a2b_base64(written, strict_mode=True)
    except ValueError as error:
        raise ValueError(f"must be a file in Base64{_base64_hint(written, str(error))}") from None
    return written


def _base64_hint(written: str, error: str) -> str:
    """Return what is wrong with a Base64 text and, for the two variants that programs write, what to do."""
    if _URL_SAFE.search(written):
        return ", with + and / where the URL-safe alphabet has - and _"
    if error == "Incorrect padding":
        return ", with its padding: append = until its length is a multiple of 4"
    return f": {error[:1].lower()}{error[1:]}"


def audio_codes(value: object) -> str:
    """Return audio codes as text, or blank text for none. A list is read as one text, as ACE-Step does."""
    written = "".join(map(text, _few(value))) if isinstance(value, list | tuple) else text(value)
    if written.strip() and not AUDIO_CODE.search(written):
        raise ValueError("must hold audio codes, 5 for each second, which look like <|audio_code_123|>")
    return written


def replaced_lines(value: object) -> object:
    """Return old lines and their new ones as a mapping of texts; JSON text of one is understood."""
    value = _unpacked(value)
    if isinstance(value, Mapping):
        lines = {text(old): text(new) for old, new in value.items()}
        if any(len(old) > _MAX_LINE or len(new) > _MAX_LYRICS for old, new in lines.items()):
            raise ValueError(f"must have lines of at most {_MAX_LINE:,} characters, and at most {_MAX_LYRICS:,} of new")
        if lines.keys() in ({"section"}, {"lyrics"}):
            raise ValueError("names a section and no lyrics, or lyrics and no section: both are needed")
        return lines
    raise ValueError('must be an object: {"line as sung": "new line"}, or {"section": "verse 2", "lyrics": "…"}')


def lora(value: object) -> object:
    """Return a LoRA's fields without those that are null; text is its path. Other values are returned as they are."""
    value = _unpacked(value)
    if isinstance(value, str):
        return {"path": value}
    if isinstance(value, Mapping):
        return {name: part for name, part in value.items() if part is not None}
    return value


def loras(value: object) -> object:
    """Return several LoRAs, each as ``lora`` does. One alone, or its path, is a list of one; null is none."""
    value = _unpacked(value)
    if value is None:
        return ()
    several = value if isinstance(value, list | tuple) else (value,)
    return tuple(lora(each) for each in _few(several))


def lora_path(value: object) -> str:
    """Return the address of a LoRA in S3, or its name in the checkpoint folder's ``loras/``."""
    written = trimmed(value)
    scheme, mark, rest = written.partition("://")
    if mark and scheme.lower() == "s3" and rest.endswith((LORA_SUFFIX, "/")):
        return "s3://" + rest
    name = written.removeprefix(_LORA_FOLDER)
    if not LORA_NAME.fullmatch(name):
        raise ValueError(
            "must be s3://bucket/key.safetensors, s3://bucket/folder/, or the name of a LoRA in the folder loras of "
            "the worker's checkpoints"
        )
    return name


def _number(value: object) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _NUMBER.fullmatch(written := value.strip()):
        return int(written) if _WHOLE.fullmatch(written) else float(written)
    raise ValueError("must be a number")


def ascii_digits(written: str) -> str:
    """Return a number in ASCII digits and without underscores between them, which Python and so ACE-Step reads too."""
    return re.sub(r"(?<=[0-9])_(?=[0-9])", "", re.sub(r"\d", lambda digit: str(int(digit[0])), written))


def _unpacked(value: object) -> object:
    """Return the list or object of a JSON text, as forms have it; other values are returned as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            found = loads(value).value
        except JsonRefused:
            return value
        return found if isinstance(found, list | dict) else value
    return value


def _several(value: object, one: Callable[[object], _T], rule: str) -> tuple[_T, ...]:
    value = _unpacked(value)
    parts: Sequence[object] = value if isinstance(value, list | tuple) else (value,)
    if isinstance(value, str):
        parts = value.split(",")
    parts = _few(parts)
    try:
        return tuple(one(part) for part in parts)
    except ValueError:
        raise ValueError(rule) from None


def _few(parts: Sequence[object]) -> Sequence[object]:
    if len(parts) > _MAX_ENTRIES:
        raise ValueError(f"must have at most {_MAX_ENTRIES:,} entries")
    return parts
