# SPDX-License-Identifier: Apache-2.0
"""Tags of a song's file: ID3v2.4 before MP3 and AAC and in a chunk of WAV, Vorbis comments in FLAC and Ogg.

FFmpeg writes Vorbis comments. It has no frames for lyrics in ID3, and the libraries that do (mutagen, eyeD3) are under
the GPL, which this project is not; so ID3 is written here, and the tests read it with mutagen. Nothing in a tag depends
on the time or the machine: the same request makes the same bytes.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

_UTF_8: Final = b"\3"
_NO_LANGUAGE: Final = b"XXX"  # as ID3v2.4 writes an unknown one
_MILLISECONDS, _IS_LYRICS = b"\2", b"\1"
_LRC_LINE: Final = re.compile(r"\[(\d+):(\d\d)\.(\d\d)\](.*)")
_RIFF_SIZE_AT, _RIFF_HEADER = 4, 8


def id3(tags: Mapping[str, str]) -> bytes:
    """Return an ID3v2.4 tag; no bytes where there are no tags.

    Names are those of Vorbis comments; ``syncedlyrics`` is LRC.
    """
    frames = b"".join(_frame(name, body) for name, body in _frames(tags))
    return b"ID3\4\0\0" + _syncsafe(len(frames)) + frames if frames else b""


def add_id3_chunk(path: Path, tags: Mapping[str, str]) -> None:
    """Add an ``id3`` chunk to the end of a WAV file. A file that is too large for RIFF's own sizes stays as it is."""
    tag = id3(tags)
    tag += b"\0" * (len(tag) % 2)
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        if not tag or size % 2 or size + _RIFF_HEADER + len(tag) >= 1 << 32:
            return
        file.write(b"id3 " + struct.pack("<I", len(tag)) + tag)
        file.seek(_RIFF_SIZE_AT)
        file.write(struct.pack("<I", size + len(tag)))  # without the first eight bytes, with those of the chunk


def _frames(tags: Mapping[str, str]) -> Iterator[tuple[bytes, bytes]]:
    for name, text in tags.items():
        encoded = text.encode()
        match name:
            case "title":
                yield b"TIT2", _UTF_8 + encoded
            case "comment":
                yield b"COMM", _UTF_8 + _NO_LANGUAGE + b"\0" + encoded
            case "lyrics":
                yield b"USLT", _UTF_8 + _NO_LANGUAGE + b"\0" + encoded
            case "syncedlyrics":
                yield b"SYLT", _UTF_8 + _NO_LANGUAGE + _MILLISECONDS + _IS_LYRICS + b"\0" + b"".join(_synced(text))
            case _:
                yield b"TXXX", _UTF_8 + name.upper().encode() + b"\0" + encoded


def _synced(lrc: str) -> Iterator[bytes]:
    """Yield each line of LRC with its time."""
    for minutes, seconds, hundredths, text in _LRC_LINE.findall(lrc):
        at_ms = (int(minutes) * 60 + int(seconds)) * 1_000 + int(hundredths) * 10
        yield text.encode() + b"\0" + struct.pack(">I", at_ms)


def _frame(name: bytes, body: bytes) -> bytes:
    return name + _syncsafe(len(body)) + b"\0\0" + body


def _syncsafe(number: int) -> bytes:
    """Return ID3's form of a number below 2**28: seven bits a byte."""
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))
