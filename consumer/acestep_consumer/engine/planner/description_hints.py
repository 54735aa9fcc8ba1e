# SPDX-License-Identifier: Apache-2.0
"""Hints in the description of a song for sample mode: the language of its lyrics, or that it has none."""

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

_LANGUAGES: Final = MappingProxyType(
    {
        "english": "en",
        "chinese": "zh",
        "mandarin": "zh",
        "中文": "zh",
        "japanese": "ja",
        "日语": "ja",
        "korean": "ko",
        "韩语": "ko",
        "spanish": "es",
        "español": "es",
        "french": "fr",
        "français": "fr",
        "german": "de",
        "deutsch": "de",
        "italian": "it",
        "italiano": "it",
        "portuguese": "pt",
        "português": "pt",
        "russian": "ru",
        "русский": "ru",
        "bengali": "bn",
        "hindi": "hi",
        "arabic": "ar",
        "thai": "th",
        "vietnamese": "vi",
        "indonesian": "id",
        "turkish": "tr",
        "dutch": "nl",
        "polish": "pl",
    }
)
"""Codes by name. A code is no hint itself: "it" and "hi" are words of a description, too."""

# Chinese is written without spaces, so that its names are found within a line as well.
_NAMED: Final = re.compile("|".join(rf"\b{name}\b" if name < "\u4e00" else name for name in _LANGUAGES))
_INSTRUMENTAL: Final = re.compile(r"instrumental|\bpure (music|instrument)|\bsolo[.!]?\s*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DescriptionHints:
    """``language``: ISO 639-1 code, None: not named. ``instrumental``: whether it asks for a song without vocals."""

    language: str | None
    instrumental: bool


def hints_in(description: str) -> DescriptionHints:
    """Return the hints in a description; of several languages the one that is named first."""
    named = _NAMED.search(description.lower())
    language = _LANGUAGES[named[0]] if named else None
    return DescriptionHints(language, bool(_INSTRUMENTAL.search(description)))
