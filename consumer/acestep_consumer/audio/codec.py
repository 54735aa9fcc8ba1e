# SPDX-License-Identifier: Apache-2.0
"""Audio codec: decodes files of any common format to stereo samples, and encodes samples in one of seven formats.

Untrusted inputs are decoded in a sandboxed process; the renderer's songs are encoded in processes of their own as well
(``encoding``). Only engine processes import this module; the names of the formats are in ``formats``.
"""

import math
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from acestep_consumer.audio.formats import FORMATS, Format
from acestep_consumer.audio.levels import Levels
from acestep_consumer.audio.peaks import peaks_of
from acestep_consumer.audio.sandbox.exit_codes import DecodeExit
from acestep_consumer.audio.sandbox.process import (
    CPU_S,
    MEMORY_BYTES,
    DecoderDied,
    DecoderTookTooLong,
    decode_into,
)
from acestep_consumer.domain.errors import InputUnreadable, RenderFailed

Samples = NDArray[np.float32]

_STEREO = 2
_PADDING_S = 0.2
_TONE_RATE = 48_000
_HINT = "send WAV, FLAC, MP3, OGG, M4A or another common format"
_REFUSALS: Final = {
    DecodeExit.NO_AUDIO_TRACK: "has no audio track",
    DecodeExit.NO_SOUND: "contains no samples",
    DecodeExit.NOT_AUDIO: f"cannot be read as audio: {_HINT}",
    DecodeExit.TOO_MUCH_MEMORY: f"needs more than {MEMORY_BYTES >> 20:,} MiB of memory to decode: {_HINT}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One encoded file. ``sample_rate`` is Hz, ``duration_s`` seconds of audio, ``peaks`` as in ``Audio``.

    ``levels``: of its sound, where it was brought to a loudness.
    """

    path: Path
    content_type: str
    sample_rate: int
    channels: int
    duration_s: float
    peaks: str
    levels: Levels | None = None


Encode: TypeAlias = Callable[[Samples, Path, str | Format, int], Encoded]
"""``encode``, or the same in another process."""


def decode(
    path: Path,
    *,
    sample_rate: int,
    max_seconds: float,
    what: str = "the audio input",
    stopped: Callable[[], bool] = lambda: False,
) -> Samples:
    """Read a file as float32 samples of shape [2, n] at ``sample_rate`` Hz.

    Mono is doubled, more than two channels are mixed down. ``what`` names the input in errors. The file is decoded in
    a sandboxed process (``acestep_consumer.audio.sandbox``), with a temporary file beside it; ``stopped`` is polled.

    Raises:
        InputUnreadable: the file is missing, not audio, empty, longer than ``max_seconds``, or crashes the decoder.
        Cancelled: ``stopped`` returned True.
        RenderFailed: no decoder can be started, or the disk is full.
    """
    # Encoders pad the end of a song by some milliseconds; a song of maximum length is accepted all the same.
    limit = math.ceil((max_seconds + _PADDING_S) * sample_rate)
    with _opened(path, what) as source, tempfile.TemporaryFile(dir=path.parent) as target:
        try:
            code = decode_into(target, source, sample_rate=sample_rate, max_samples=limit, stopped=stopped)
        except DecoderTookTooLong as error:
            raise InputUnreadable(f"{what} takes more than {CPU_S} seconds to decode: {_HINT}") from error
        except DecoderDied as error:
            raise InputUnreadable(f"{what} cannot be read, it crashes the decoder: {_HINT}") from error
        except OSError as error:
            raise RenderFailed(f"no process can be started to read {what} ({type(error).__name__})") from error
        _require_stereo(code, what, max_seconds)
        target.seek(0)
        return _checked(np.fromfile(target, dtype=np.float32), limit, what)


def _opened(path: Path, what: str) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise InputUnreadable(f"{what} is missing") from error
    except OSError as error:
        raise InputUnreadable(f"{what} cannot be read as audio ({type(error).__name__})") from error


def _require_stereo(code: DecodeExit, what: str, max_seconds: float) -> None:
    if code is DecodeExit.TOO_LONG:
        raise InputUnreadable(f"{what} is longer than {max_seconds:g} seconds")
    if code is DecodeExit.NO_ROOM:
        raise RenderFailed(f"the worker's disk has no room for the samples of {what}")
    if code is not DecodeExit.STEREO:
        raise InputUnreadable(f"{what} {_REFUSALS[code]}")


def _checked(values: Samples, limit: int, what: str) -> Samples:
    """Validate the child's output, which is untrusted: finite values in pairs, no more than allowed."""
    if not 0 < len(values) <= limit * _STEREO or len(values) % _STEREO:
        raise InputUnreadable(f"{what} cannot be read, the decoder returns invalid samples: {_HINT}")
    if not np.isfinite(values).all():
        raise InputUnreadable(f"{what} has samples that are not numbers")
    return np.ascontiguousarray(values.reshape(-1, _STEREO).T)


def encode(samples: Samples, stem: Path, audio_format: str | Format, sample_rate: int) -> Encoded:
    """Encode a song in this process; ``encoding.pool`` does it in others. See ``encode_with``."""
    # Not at the top: FFmpeg's libraries are loaded only in processes that encode.
    from acestep_consumer.audio.encoding.encode import EncodingFailed, write_song  # noqa: PLC0415 - see above

    def write(samples: Samples, path: Path, wanted: Format, sample_rate: int) -> Levels | None:
        try:
            return write_song(samples, path, wanted, sample_rate)
        except EncodingFailed as error:
            raise RenderFailed(str(error)) from error

    return encode_with(write, samples, stem, audio_format, sample_rate)


def encode_with(
    write: Callable[[Samples, Path, Format, int], Levels | None],
    samples: Samples,
    stem: Path,
    audio_format: str | Format,
    sample_rate: int,
) -> Encoded:
    """Write float samples of shape [channels, n], 1 or 2 channels, full scale 1.0, to ``stem`` plus the suffix.

    ``audio_format``: one of ``FORMATS`` by its name, or one with other values. Samples over full scale are clipped,
    except in ``wav32``. A file that cannot be completed is removed.

    Raises:
        RenderFailed: the samples are not finite numbers, or the encoder refused them.
    """
    wanted = FORMATS[audio_format] if isinstance(audio_format, str) else audio_format
    channels, length = samples.shape
    path = stem.with_name(stem.name + wanted.suffix)
    levels = write(np.ascontiguousarray(samples, dtype=np.float32), path, wanted, sample_rate)
    return Encoded(
        path=path,
        content_type=wanted.content_type,
        sample_rate=wanted.sample_rate or sample_rate,
        channels=channels,
        duration_s=length / sample_rate,
        levels=levels,
        peaks=peaks_of(samples, 1.0 if levels is None else levels.gain),
    )


def check_encoders(encode: Encode = encode) -> tuple[str, ...]:
    """Return the formats that can be encoded here: those in which encoding a short tone works."""
    tone = np.sin(np.linspace(0, 400, 4_800, dtype=np.float32)) / 2
    with tempfile.TemporaryDirectory(prefix="encoders-") as folder:
        return tuple(name for name in FORMATS if _can_encode(encode, np.stack((tone, tone)), Path(folder), name))


def check_decoder() -> str | None:
    """Return why no audio input can be decoded here, or None: tried with a short tone in a decoder process."""
    with tempfile.TemporaryDirectory(prefix="decoder-") as folder:
        tone = Path(folder) / "tone.wav"
        with wave.open(str(tone), "wb") as file:
            file.setparams((_STEREO, 2, _TONE_RATE, 0, "NONE", ""))
            file.writeframes(np.full(480 * _STEREO, 8_192, dtype="<i2").tobytes())
        try:
            decode(tone, sample_rate=_TONE_RATE, max_seconds=1)
        except (InputUnreadable, RenderFailed) as error:
            return str(error)
    return None


def _can_encode(encode: Encode, samples: Samples, folder: Path, audio_format: str) -> bool:
    try:
        return encode(samples, folder / audio_format, audio_format, _TONE_RATE).path.stat().st_size > 0
    except RenderFailed:
        return False
