# SPDX-License-Identifier: Apache-2.0
"""The audio formats that songs are written in: names, file suffixes, content types, codecs. Data only."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How one output format is written. ``bit_rate`` is bits a second, None where nothing is lost.

    ``sample_rate`` (Hz) is set where the codec has rates of its own; samples at another rate are resampled to it.
    ``effort`` is FFmpeg's ``compression_level``: for LAME 0 (slow) to 9 (fast).
    """

    suffix: str
    content_type: str
    container: str
    codec: str
    bit_rate: int | None = None
    sample_rate: int | None = None
    effort: str | None = None


# Ogg/Opus under its two usual names. Opus has a rate of its own.
_OGG = Format(
    suffix=".ogg",
    content_type="audio/ogg",
    container="ogg",
    codec="libopus",
    bit_rate=160_000,
    sample_rate=48_000,
)
FORMATS: Final = MappingProxyType(
    {
        # LAME's own default, 5, takes half again as long: 13 s of a core for a song of 300 s. A GPU makes one in 0.4 s.
        "mp3": Format(
            suffix=".mp3",
            content_type="audio/mpeg",
            container="mp3",
            codec="libmp3lame",
            bit_rate=192_000,
            effort="7",
        ),
        "wav": Format(suffix=".wav", content_type="audio/wav", container="wav", codec="pcm_s16le"),
        "wav32": Format(suffix=".wav", content_type="audio/wav", container="wav", codec="pcm_f32le"),
        "flac": Format(suffix=".flac", content_type="audio/flac", container="flac", codec="flac"),
        "ogg": _OGG,
        "opus": replace(_OGG, suffix=".opus", content_type="audio/ogg; codecs=opus"),
        # ADTS, not MP4: it is what the suffix promises, and it can be played while it is being downloaded.
        "aac": Format(suffix=".aac", content_type="audio/aac", container="adts", codec="aac", bit_rate=192_000),
    }
)
