# SPDX-License-Identifier: Apache-2.0
"""Output formats of songs: names, file suffixes, content types, codecs, and what a request adds. Data only."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One output format.

    Attributes:
        suffix: of file names, with the dot.
        content_type: as HTTP has it.
        container: FFmpeg's name of the container.
        codec: FFmpeg's name of the encoder.
        bit_rate: bits a second; None: lossless.
        sample_rate: Hz, where the codec has a fixed rate, to which samples are resampled; None: any.
        compression_level: FFmpeg's option of that name; for LAME 0 (slow) to 9 (fast), for Opus 0 (fast) to 10 (slow).
        tags: names and texts that are written into the file; see ``encoding.tags``.
        loudness_lufs: integrated loudness that the song is brought to; None: its level stays.
        true_peak_db: dB of full scale that its true peak must not pass on the way.
    """

    suffix: str
    content_type: str
    container: str
    codec: str
    bit_rate: int | None = None
    sample_rate: int | None = None
    compression_level: str | None = None
    tags: tuple[tuple[str, str], ...] = ()
    loudness_lufs: float | None = None
    true_peak_db: float = -1.0


# Ogg/Opus under its two usual names. Level 7 is as near to the samples as 10, in two thirds of the time; below 7 Opus
# does without the analysis that chooses how many bits a passage gets.
_OGG = Format(
    suffix=".ogg",
    content_type="audio/ogg",
    container="ogg",
    codec="libopus",
    bit_rate=160_000,
    sample_rate=48_000,
    compression_level="7",
)
FORMATS: Final = MappingProxyType(
    {
        # LAME's default, 5, takes 1.5 times as long. A GPU renders a song of 300 s in 0.3 s.
        "mp3": Format(
            suffix=".mp3",
            content_type="audio/mpeg",
            container="mp3",
            codec="libmp3lame",
            bit_rate=192_000,
            compression_level="7",
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
