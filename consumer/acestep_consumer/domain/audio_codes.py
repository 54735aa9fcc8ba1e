# SPDX-License-Identifier: Apache-2.0
"""Audio codes as text, such as ``<|audio_code_12|><|audio_code_7|>``: formats, parses and validates them. Pure.

Requests and plans carry codes in this form, which is also their spelling in the language model's vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from acestep_schemas.coerce import AUDIO_CODE

CODES_PER_SECOND: Final = 5
CODE_COUNT: Final = 64_000
"""Size of the codebook: codes are 0 to 63,999."""

# Numbers beyond the codebook stand for its last code; Python refuses to read one of thousands of digits.
_BEYOND: Final = 999_999_999
_MAX_DIGITS: Final = 9


def format_code(number: int) -> str:
    """Return one code as text, such as ``<|audio_code_12|>``."""
    return f"<|audio_code_{number}|>"


def format_codes(numbers: Iterable[int]) -> str:
    """Return codes as one text."""
    return "".join(map(format_code, numbers))


def parse_codes(text: str) -> tuple[int, ...]:
    """Return the codes in a text, in order, 999,999,999 at most; anything between them is ignored."""
    return tuple(map(_number, AUDIO_CODE.findall(text)))


def parse_songs(texts: Sequence[str], songs: int) -> tuple[tuple[int, ...], ...]:
    """Return the codes of each of ``songs`` songs. A single text is used for all of them.

    Raises:
        ValueError: there is no code, or the songs have different numbers of codes.
    """
    parsed = tuple(map(parse_codes, texts))
    if len({len(codes) for codes in parsed}) > 1 or len(parsed) not in (1, songs):
        raise ValueError("the songs of one request need equally many audio codes each")
    if not parsed[0]:
        raise ValueError("audio_code_string holds no code; codes look like <|audio_code_123|>")
    return parsed * songs if len(parsed) == 1 else parsed


def _number(digits: str) -> int:
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) <= _MAX_DIGITS else _BEYOND
