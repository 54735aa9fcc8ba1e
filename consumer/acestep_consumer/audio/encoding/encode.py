# SPDX-License-Identifier: Apache-2.0
"""Writes the samples of a song into an audio file, with PyAV, which brings its own FFmpeg, or with LAME."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.codec.context import CodecContext
from av.container import OutputContainer
from numpy.typing import NDArray

from acestep_consumer.audio.encoding import lame
from acestep_consumer.audio.encoding.flac import append_frames
from acestep_consumer.audio.encoding.loudness import gain_db, measure
from acestep_consumer.audio.encoding.tags import add_id3_chunk, id3
from acestep_consumer.audio.formats import Format
from acestep_consumer.audio.levels import Levels

Samples = NDArray[np.float32]

_CHUNK = 1 << 16
_LAYOUTS = {1: "mono", 2: "stereo"}


class EncodingFailed(Exception):
    """The file cannot be written; the text is public. It is raised from the encoder's error, if there is one."""


def write_song(samples: Samples, path: Path, wanted: Format, sample_rate: int, threads: int = 1) -> Levels | None:
    """Write float samples of shape [channels, n], 1 or 2 channels, full scale 1.0.

    ``threads``: at most so many encode; the file is the same with any number of them. Only FLAC uses more than one.

    Returns the song's levels where the format names a loudness that it is brought to. A file that cannot be completed
    is removed.

    Raises:
        EncodingFailed: the samples are not finite numbers, or the encoder refused them, or the disk is full.
    """
    if samples.shape[1] == 0 or not all(np.isfinite(chunk).all() for chunk in _chunks(samples)):
        raise EncodingFailed("the model returned samples that are not finite numbers, or none")
    try:
        samples, reached = _levelled(samples, wanted, sample_rate)
        if wanted.codec == "libmp3lame" and lame.library() is not None:
            _write_by_lame(samples, path, wanted, sample_rate)
        elif wanted.codec == "flac" and threads > 1 and wanted.sample_rate in {None, sample_rate}:
            # Parts that are resampled would not fit together.
            _write_flac(samples, path, wanted, sample_rate, threads)
        else:
            write_by_ffmpeg(samples, path, wanted, sample_rate)
        if wanted.container == "wav":
            add_id3_chunk(path, dict(wanted.tags))
    except (av.FFmpegError, lame.LameError, ValueError, OSError) as error:
        path.unlink(missing_ok=True)
        raise EncodingFailed(f"the {wanted.suffix[1:]} encoder failed ({type(error).__name__})") from error
    return reached


def _levelled(samples: Samples, wanted: Format, sample_rate: int) -> tuple[Samples, Levels | None]:
    """Return the samples at the loudness that is wanted, and their levels; None where none is."""
    if wanted.loudness_lufs is None:
        return samples, None
    measured = measure(frames_of(samples, sample_rate), _LAYOUTS[samples.shape[0]], sample_rate)
    gain = gain_db(measured, wanted.loudness_lufs, wanted.true_peak_db)
    return samples * np.float32(10 ** (gain / 20)), measured.raised(gain)


def write_by_ffmpeg(samples: Samples, path: Path, wanted: Format, sample_rate: int) -> None:
    """Write a file with the encoder of FFmpeg that the format names."""
    with _opened(path, wanted) as container:
        stream = _add_stream(container, samples, wanted, sample_rate)
        for frame in frames_of(samples, sample_rate):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_flac(samples: Samples, path: Path, wanted: Format, sample_rate: int, threads: int) -> None:
    with _opened(path, wanted) as container:
        stream = _add_stream(container, samples, wanted, sample_rate)
        container.start_encoding()

    def open_encoder() -> AudioCodecContext:
        encoder = cast("AudioCodecContext", CodecContext.create(wanted.codec, "w"))
        encoder.sample_rate, encoder.layout, encoder.format = stream.sample_rate, stream.layout, stream.format
        encoder.options = _options(wanted)
        encoder.open()
        return encoder

    append_frames(
        path,
        lambda first, last: frames_of(samples[:, first:last], sample_rate),
        samples.shape[1],
        threads,
        open_encoder,
    )


def _add_stream(container: OutputContainer, samples: Samples, wanted: Format, sample_rate: int) -> AudioStream:
    rate, layout = wanted.sample_rate or sample_rate, _LAYOUTS[samples.shape[0]]
    stream = cast("AudioStream", container.add_stream(wanted.codec, rate=rate, layout=layout))
    if wanted.bit_rate:
        stream.bit_rate = wanted.bit_rate
    stream.options = {**_options(wanted)}
    return stream


def _options(wanted: Format) -> dict[str, str]:
    """Return the options of FFmpeg's encoder."""
    return {"compression_level": wanted.compression_level} if wanted.compression_level else {}


@contextmanager
def _opened(path: Path, wanted: Format) -> Iterator[OutputContainer]:
    """Open a file for FFmpeg, with its tags."""
    if wanted.container == "adts":  # FFmpeg writes there what follows the tag
        with path.open("wb") as file:
            file.write(id3(dict(wanted.tags)))
            with av.open(file, "w", format=wanted.container) as container:
                yield container
        return
    with av.open(str(path), "w", format=wanted.container) as container:
        if wanted.container != "wav":
            container.metadata.update(wanted.tags)
        yield container


def _write_by_lame(samples: Samples, path: Path, wanted: Format, sample_rate: int) -> None:
    options = lame.Mp3Options(
        channels=samples.shape[0],
        sample_rate=wanted.sample_rate or sample_rate,
        bit_rate=wanted.bit_rate or 0,
        quality=int(wanted.compression_level or 0),
    )
    same_rate = options.sample_rate == sample_rate
    chunks = _chunks(samples) if same_rate else _resampled(samples, sample_rate, options.sample_rate)
    with path.open("wb") as file:
        file.write(id3(dict(wanted.tags)))
        lame.write_mp3(file, chunks, options)


def _chunks(samples: Samples) -> Iterator[Samples]:
    for start in range(0, samples.shape[1], _CHUNK):
        yield samples[:, start : start + _CHUNK]


def frames_of(samples: Samples, sample_rate: int) -> Iterator[AudioFrame]:
    """Planar float frames; PyAV converts them to the encoder's sample format, rate and frame size."""
    for index, chunk in enumerate(_chunks(samples)):
        frame = AudioFrame.from_ndarray(np.ascontiguousarray(chunk), format="fltp", layout=_LAYOUTS[len(samples)])
        frame.sample_rate, frame.pts = sample_rate, index * _CHUNK
        yield frame


def _resampled(samples: Samples, sample_rate: int, rate: int) -> Iterator[Samples]:
    """Resample with FFmpeg, whose filter is better than LAME's own."""
    resampler = av.AudioResampler(format="fltp", layout=_LAYOUTS[len(samples)], rate=rate)
    for frame in chain(frames_of(samples, sample_rate), (None,)):
        for resampled in resampler.resample(frame):
            yield resampled.to_ndarray().astype(np.float32, copy=False)
