# SPDX-License-Identifier: Apache-2.0
"""MP3 encoding by LAME's C interface, taken from the shared library of the package ``lameenc``.

FFmpeg's builds for Python contain LAME as well, compiled without optimisation: four times slower. The Python class of
``lameenc`` takes 16-bit samples and writes no LAME tag, without which players do not know the exact length. Its library
exports all of LAME: float samples, and the tag.
"""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SETTERS: Final = (
    "lame_set_num_channels",
    "lame_set_mode",
    "lame_set_in_samplerate",
    "lame_set_out_samplerate",
    "lame_set_brate",
    "lame_set_quality",
    "lame_set_bWriteVbrTag",
)
# Function -> type of its result, types of its arguments.
_FUNCTIONS: Final = {
    **dict.fromkeys(_SETTERS, (_INT, (_POINTER, _INT))),
    "lame_init": (_POINTER, ()),
    "lame_init_params": (_INT, (_POINTER,)),
    "lame_encode_buffer_ieee_float": (_INT, (_POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT)),
    "lame_encode_flush": (_INT, (_POINTER, _POINTER, _INT)),
    "lame_get_lametag_frame": (_SIZE, (_POINTER, _POINTER, _SIZE)),
    "lame_close": (_INT, (_POINTER,)),
}
_JOINT_STEREO, _MONO = 1, 3
_FLUSH_BYTES = 7_200
"""LAME's bound for a flush, for a tag, and for what an encoded buffer takes beyond 1.25 bytes a sample."""


class LameError(Exception):
    """LAME refused the parameters or the samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mp3Options:
    """Parameters of an MP3 file.

    Attributes:
        channels: 1 or 2.
        sample_rate: of the samples and of the file, Hz.
        bit_rate: bits a second, constant.
        quality: 0, best and slowest, to 9.
    """

    channels: int
    sample_rate: int
    bit_rate: int
    quality: int


@cache
def library() -> ctypes.CDLL | None:
    """Return LAME; None where ``lameenc`` is not installed, or does not export LAME."""
    try:
        import lameenc  # noqa: PLC0415 - may be missing

        lame = ctypes.CDLL(lameenc.__file__)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(lame, name)
            function.restype, function.argtypes = result, arguments
    except (ImportError, OSError, AttributeError):
        return None
    return lame


def write_mp3(file: BinaryIO, chunks: Iterable[NDArray[np.float32]], options: Mp3Options) -> None:
    """Write an MP3 file with a LAME tag, so that decoders cut the encoder's padding off; after what ``file`` has.

    ``chunks`` are float samples of shape [channels, n], full scale 1.0, each row contiguous. ``file`` must be seekable.

    Raises:
        LameError: a rate that MP3 does not have, or an error of the library.
    """
    lame = library()
    if lame is None:
        raise LameError("lameenc is missing")
    start = file.tell()
    with _encoder(lame, options) as encoder:
        file.writelines(_encoded(lame, encoder, chunk) for chunk in chunks)
        buffer = ctypes.create_string_buffer(_FLUSH_BYTES)
        flushed = _checked(lame.lame_encode_flush(encoder, buffer, len(buffer)))
        file.write(buffer.raw[:flushed])
        # The first frame is a placeholder for the tag, which has the length.
        length = lame.lame_get_lametag_frame(encoder, buffer, len(buffer))
        if not 0 < length <= len(buffer):
            raise LameError(f"a tag of {length} bytes")
        file.seek(start)
        file.write(buffer.raw[:length])


@contextmanager
def _encoder(lame: ctypes.CDLL, options: Mp3Options) -> Iterator[int]:
    encoder = lame.lame_init()
    if not encoder:
        raise MemoryError
    try:
        for name, value in (
            ("lame_set_num_channels", options.channels),
            ("lame_set_mode", _MONO if options.channels == 1 else _JOINT_STEREO),
            ("lame_set_in_samplerate", options.sample_rate),
            # Set, lest LAME chooses a lower one for a low bit rate.
            ("lame_set_out_samplerate", options.sample_rate),
            ("lame_set_brate", options.bit_rate // 1_000),
            ("lame_set_quality", options.quality),
            ("lame_set_bWriteVbrTag", 1),
        ):
            _checked(getattr(lame, name)(encoder, value))
        _checked(lame.lame_init_params(encoder))
        yield encoder
    finally:
        lame.lame_close(encoder)


def _encoded(lame: ctypes.CDLL, encoder: int, chunk: NDArray[np.float32]) -> bytes:
    left, right, samples = chunk[0], chunk[-1], chunk.shape[1]
    if chunk.dtype != np.float32 or not left.flags.c_contiguous:
        raise LameError("samples must be contiguous 32-bit floats")
    buffer = ctypes.create_string_buffer(samples + samples // 4 + _FLUSH_BYTES)
    written = lame.lame_encode_buffer_ieee_float(
        encoder, left.ctypes.data, right.ctypes.data, samples, buffer, len(buffer)
    )
    return buffer.raw[: _checked(written)]


def _checked(result: int) -> int:
    if result < 0:
        raise LameError(f"error {result}")
    return result
