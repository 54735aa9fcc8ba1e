# SPDX-License-Identifier: Apache-2.0
"""Framing of messages on the pipe: a 4-byte big-endian length, then that many bytes of JSON."""

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator

_LENGTH = struct.Struct(">I")


def pack(payload: bytes) -> bytes:
    """Return the frame that carries ``payload``."""
    return _LENGTH.pack(len(payload)) + payload


async def read(stream: asyncio.StreamReader) -> bytes:
    """Return the next payload. Raises ``asyncio.IncompleteReadError`` at the end of the stream."""
    (length,) = _LENGTH.unpack(await stream.readexactly(_LENGTH.size))
    return await stream.readexactly(length)


class FrameSocket:
    """The engine's blocking end of the pipe; ``send`` may be called from any thread."""

    def __init__(self, end: socket.socket) -> None:
        self._reader = end.makefile("rb")
        self._end = end
        self._sending = threading.Lock()

    def __iter__(self) -> Iterator[bytes]:
        """Yield payloads until the other side closes."""
        while len(head := self._read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(head)
            payload = self._read(length)
            if len(payload) < length:
                return
            yield payload

    def send(self, payload: bytes) -> None:
        """Send one frame. Raises ``OSError`` when the other side has closed."""
        with self._sending:
            self._end.sendall(pack(payload))

    def _read(self, size: int) -> bytes:
        """Return so many bytes, or fewer at the end of the stream."""
        try:
            return self._reader.read(size)
        except ConnectionResetError:  # the other side closed while there was something that it had not read
            return b""
