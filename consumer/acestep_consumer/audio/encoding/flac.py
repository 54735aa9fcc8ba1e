# SPDX-License-Identifier: Apache-2.0
"""FLAC encoding on several threads: FFmpeg encodes parts of a song, whose frames are numbered as those of one stream.

Frames of FLAC do not depend on each other, so the file is to the byte what one thread writes. FFmpeg's encoder has no
threads of its own. Format: RFC 9639, sections 8.2 and 9.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Final

from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler

Frames = Callable[[int, int], Iterator[AudioFrame]]
"""Yields the samples of a song from a first one to before a last one."""

_STREAMINFO_AT: Final = 8
_STREAMINFO_BYTES: Final = 34
_LENGTH_BITS: Final = 36

_NUMBER_AT: Final = 4
"""Bytes of a frame before its number."""

_BLOCK_SIZE_BYTES: Final = {6: 1, 7: 2}
_SAMPLE_RATE_BYTES: Final = {12: 1, 13: 2, 14: 2}
"""Codes in a frame's header that say that the value itself follows the number, in so many bytes."""

_CRC_8: Final = (8, 0x07)
_CRC_16: Final = (16, 0x8005)
"""Bits and polynomial."""

_PERIOD: Final = 32_767
"""Bits after which the powers of x repeat, modulo CRC-16's polynomial."""


def append_frames(
    path: Path, frames: Frames, length: int, threads: int, open_encoder: Callable[[], AudioCodecContext]
) -> None:
    """Encode a song of ``length`` samples on several threads into a file that has its header and no frame yet."""
    first = open_encoder()
    size = first.frame_size
    part = -(-length // (size * threads)) * size
    encoders = chain((first,), iter(open_encoder, None))
    with ThreadPoolExecutor(threads + 1, thread_name_prefix="flac") as pool:
        parts = [
            pool.submit(_encoded, encoder, frames(start, min(start + part, length)), start // size)
            for start, encoder in zip(range(0, length, part), encoders, strict=False)
        ]
        digest = pool.submit(_md5, first, frames(0, length))
        encoded = list(chain.from_iterable(each.result() for each in parts))
    sizes = [len(frame) for frame in encoded]
    with path.open("r+b") as file:
        file.seek(_STREAMINFO_AT)
        info = file.read(_STREAMINFO_BYTES)
        file.seek(_STREAMINFO_AT)
        file.write(_stream_info(info, min(sizes), max(sizes), length, digest.result()))
        file.seek(0, 2)
        file.writelines(encoded)


def _encoded(encoder: AudioCodecContext, frames: Iterator[AudioFrame], number: int) -> list[bytes]:
    """Return the encoded frames of a part, the first of which is to have this number in the song."""
    packets = (bytes(packet) for frame in chain(frames, (None,)) for packet in encoder.encode(frame) if packet.size)
    return [_renumbered(packet, place) for place, packet in enumerate(packets, number)]


def _md5(encoder: AudioCodecContext, frames: Iterator[AudioFrame]) -> bytes:
    """Return the MD5 of the samples as they are encoded, by which decoders check a file."""
    digest = hashlib.md5(usedforsecurity=False)
    resampler = AudioResampler(encoder.format, encoder.layout, encoder.sample_rate)
    for frame in chain(frames, (None,)):
        for converted in resampler.resample(frame):
            digest.update(converted.to_ndarray().data)
    return digest.digest()


def _stream_info(info: bytes, smallest: int, largest: int, length: int, digest: bytes) -> bytes:
    """Return a STREAMINFO with the sizes of the frames in bytes, the song's length in samples, and its MD5."""
    parameters = int.from_bytes(info[10:18]) >> _LENGTH_BITS << _LENGTH_BITS
    return info[:4] + smallest.to_bytes(3) + largest.to_bytes(3) + (parameters | length).to_bytes(8) + digest


def _renumbered(frame: bytes, number: int) -> bytes:
    """Return a frame with another number, and with the checksums that follow from it."""
    ones = 8 - (frame[_NUMBER_AT] ^ 0xFF).bit_length()
    after_number = _NUMBER_AT + max(1, ones)
    codes = _BLOCK_SIZE_BYTES.get(frame[2] >> 4, 0), _SAMPLE_RATE_BYTES.get(frame[2] & 15, 0)
    header_end = after_number + sum(codes) + 1
    old, body = frame[:header_end], frame[header_end:-2]
    new = frame[:_NUMBER_AT] + chr(number).encode("utf-8", "surrogatepass") + frame[after_number : header_end - 1]
    new += _crc(new, *_CRC_8).to_bytes(1)
    # A CRC is linear: how a header's change changes that of the whole frame follows from the frame's length.
    change = _crc(old, *_CRC_16) ^ _crc(new, *_CRC_16)
    checksum = int.from_bytes(frame[-2:]) ^ _followed(change, len(body))
    return b"".join((new, body, checksum.to_bytes(2)))


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    table, crc = _table(bits, polynomial), 0
    for byte in data:
        crc = (crc << 8) & ((1 << bits) - 1) ^ table[crc >> (bits - 8) ^ byte]
    return crc


@cache
def _table(bits: int, polynomial: int) -> list[int]:
    """Return the CRC of each byte."""
    return [_power_sum(byte, bits, _powers(bits, polynomial, bits + 8)) for byte in range(256)]


def _followed(crc: int, length: int) -> int:
    """Return what a CRC-16 is once so many bytes of zeros have followed."""
    return _power_sum(crc, 8 * length, _powers(*_CRC_16, _PERIOD))


def _power_sum(value: int, shift: int, powers: list[int]) -> int:
    """Return the polynomial ``value`` times x to the power of ``shift``, modulo the CRC's."""
    total = 0
    for bit in range(value.bit_length()):
        if value >> bit & 1:
            total ^= powers[(bit + shift) % len(powers)]
    return total


@cache
def _powers(bits: int, polynomial: int, count: int) -> list[int]:
    """Return the first powers of x, modulo a CRC's polynomial."""
    powers = [1]
    while len(powers) < count:
        doubled = powers[-1] << 1
        powers.append(doubled ^ (1 << bits | polynomial) if doubled >> bits else doubled)
    return powers
