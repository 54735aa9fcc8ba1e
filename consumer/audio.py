# SPDX-License-Identifier: Apache-2.0
"""Sound in and out of files: any common format becomes stereo samples, samples become one of seven formats.

All of it goes through PyAV, which brings its own FFmpeg. Engine processes alone import this; the names of the formats
are in ``formats``.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from consumer.errors import InputUnreadable, RenderFailed
from consumer.formats import FORMATS, Format

Samples = NDArray[np.float32]

# Inputs come from strangers. FFmpeg also reads playlists, which name other files and hosts; only plain containers may
# be opened, and only as the file that was given.
_CONTAINERS = "aac,ac3,aiff,amr,ape,asf,au,caf,eac3,flac,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,ogg,tta,w64,wav,wv"
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
_STEREO = 2
_PADDING_S = 0.2
_TONE_RATE = 48_000
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One audio file. ``sample_rate`` is Hz, ``duration_s`` seconds of sound."""

    path: Path
    content_type: str
    sample_rate: int
    channels: int
    duration_s: float


def decode(path: Path, *, sample_rate: int, max_seconds: float, what: str = "the audio input") -> Samples:
    """Read a file as float32 samples of shape [2, n] at ``sample_rate`` Hz.

    Mono is doubled, more than two channels are mixed down. ``what`` names the input in errors.

    Raises:
        InputUnreadable: the file is missing, is no audio, is empty, or is longer than ``max_seconds``.
    """
    # Encoders pad the end of a song by some milliseconds; that must not make a song of full length too long.
    limit = math.ceil((max_seconds + _PADDING_S) * sample_rate)
    pieces: list[Samples] = []
    length = 0
    try:
        with av.open(str(path), options=_OPEN_OPTIONS) as container:
            if not container.streams.audio:
                raise InputUnreadable(f"{what} has no audio track")
            for piece in _resampled(container, sample_rate):
                pieces.append(piece)
                length += piece.shape[1]
                if length > limit:
                    raise InputUnreadable(f"{what} is longer than {max_seconds:g} seconds")
    except FileNotFoundError as error:
        raise InputUnreadable(f"{what} is missing") from error
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise InputUnreadable(f"{what} cannot be read as audio ({type(error).__name__})") from error
    if length == 0:
        raise InputUnreadable(f"{what} holds no sound")
    samples = np.concatenate(pieces, axis=1)
    if not np.isfinite(samples).all():
        raise InputUnreadable(f"{what} holds samples that are not numbers")
    return samples


def encode(samples: Samples, stem: Path, audio_format: str, sample_rate: int) -> Encoded:
    """Write float samples of shape [channels, n], 1 or 2 channels, full scale 1.0, to ``stem`` plus the suffix.

    What is over full scale is clipped, except in ``wav32``. A file that cannot be finished is removed.

    Raises:
        RenderFailed: the samples are not finite numbers, or the encoder refused them.
    """
    wanted = FORMATS[audio_format]
    channels, length = samples.shape
    if length == 0 or not np.isfinite(samples).all():
        raise RenderFailed("the model returned samples that are not finite numbers, or none")
    path = stem.with_name(stem.name + wanted.suffix)
    try:
        _write(np.ascontiguousarray(samples, dtype=np.float32), path, wanted, sample_rate)
    except (av.FFmpegError, ValueError) as error:
        path.unlink(missing_ok=True)
        raise RenderFailed(f"the {audio_format} encoder failed ({type(error).__name__})") from error
    return Encoded(
        path=path,
        content_type=wanted.content_type,
        sample_rate=wanted.sample_rate or sample_rate,
        channels=channels,
        duration_s=length / sample_rate,
    )


def check_encoders() -> tuple[str, ...]:
    """Return the formats that can be written here, each proved by encoding a short tone."""
    tone = np.sin(np.linspace(0, 400, 4_800, dtype=np.float32)) / 2
    with tempfile.TemporaryDirectory(prefix="encoders-") as folder:
        return tuple(name for name in FORMATS if _can_encode(np.stack((tone, tone)), Path(folder) / name, name))


def _can_encode(samples: Samples, stem: Path, audio_format: str) -> bool:
    try:
        return encode(samples, stem, audio_format, _TONE_RATE).path.stat().st_size > 0
    except RenderFailed:
        return False


def _write(samples: Samples, path: Path, wanted: Format, sample_rate: int) -> None:

    layout = "stereo" if samples.shape[0] == _STEREO else "mono"
    with av.open(str(path), "w", format=wanted.container) as container:
        rate = wanted.sample_rate or sample_rate
        stream = cast("AudioStream", container.add_stream(wanted.codec, rate=rate, layout=layout))
        if wanted.bit_rate:
            stream.bit_rate = wanted.bit_rate
        if wanted.effort:
            stream.options = {"compression_level": wanted.effort}
        for frame in _frames(samples, layout, sample_rate):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _frames(samples: Samples, layout: str, sample_rate: int) -> Iterator[AudioFrame]:
    """Planar float frames; the encoder's own sample format, rate and frame size are PyAV's work."""
    for start in range(0, samples.shape[1], _CHUNK):
        chunk = np.ascontiguousarray(samples[:, start : start + _CHUNK])
        frame = AudioFrame.from_ndarray(chunk, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = sample_rate, start
        yield frame


def _resampled(container: InputContainer, sample_rate: int) -> Iterator[Samples]:
    """Decode the first audio track, piece by piece, as stereo."""
    resampler: av.AudioResampler | None = None
    for frame in container.decode(audio=0):
        if resampler is None:
            # FFmpeg turns mono into a quieter stereo, so mono stays mono here and is doubled below.
            layout = "mono" if frame.layout.nb_channels == 1 else "stereo"
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=sample_rate)
        yield from map(_stereo, resampler.resample(frame))
    if resampler is not None:
        yield from map(_stereo, resampler.resample(None))


def _stereo(frame: AudioFrame) -> Samples:
    samples = cast("Samples", frame.to_ndarray())
    return samples.repeat(_STEREO, axis=0) if samples.shape[0] == 1 else samples
