# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy that breaks connections on purpose: cut, stalled, slowed, or dropped after so many bytes."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from types import TracebackType

_CHUNK = 64 * 1024
_LOOPBACK = "127.0.0.1"


class Proxy:
    """Forwards a port of 127.0.0.1 to ``host:port``.

    Faults act on connections that are open and on later ones alike, until ``heal``. Bytes are never changed.
    """

    def __init__(self, host: str, port: int, *, listen_port: int = 0) -> None:
        self._target = (host, port)
        self._port = listen_port
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self._bytes_per_s = math.inf
        self._budget = math.inf
        self.accepted = 0

    @classmethod
    def for_url(cls, url: str, *, listen_port: int = 0) -> Self:
        """Return a proxy to the host and port of ``url``."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        return cls(parts.hostname, parts.port, listen_port=listen_port)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    @property
    def open(self) -> int:
        """How many connections pass through it now."""
        return len(self._writers) // 2

    def url(self, url: str) -> str:
        """Return ``url`` with its host and port replaced by the proxy's."""
        parts = urlsplit(url)
        user = parts.netloc.rpartition("@")[0]
        return urlunsplit(parts._replace(netloc=f"{user}@{_LOOPBACK}:{self._port}"))

    def cut(self) -> int:
        """Reset every open connection; later ones pass. How many there were."""
        cut = self.open
        for writer in self._writers:
            writer.transport.abort()
        return cut

    def refuse(self) -> None:
        """Reset what is open, and whatever connects from now on."""
        self._refusing = True
        self.cut()

    def stall(self) -> None:
        """Keep connections open, and pass nothing on."""
        self._flowing.clear()

    def slow(self, bytes_per_s: float) -> None:
        """Pass at most so many bytes a second, in each direction of each connection."""
        self._bytes_per_s = bytes_per_s

    def drop_after(self, count: int) -> None:
        """Cut everything once ``count`` more bytes have passed, in both directions together."""
        self._budget = count

    def heal(self) -> None:
        """Pass everything again."""
        self._refusing = False
        self._bytes_per_s = math.inf
        self._budget = math.inf
        self._flowing.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, _LOOPBACK, self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.heal()
        self.cut()
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self.accepted += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            pipe = asyncio.create_task(self._pipe(source, sink))
            self._pipes.add(pipe)
            pipe.add_done_callback(self._pipes.discard)

    async def _pipe(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                while chunk := await source.read(_CHUNK):
                    await self._pass(chunk, sink)
        finally:
            self._writers.discard(sink)
            sink.close()

    async def _pass(self, chunk: bytes, sink: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        if len(chunk) > self._budget:
            sink.write(chunk[: int(self._budget)])
            self._budget = math.inf
            self.cut()
            return
        self._budget -= len(chunk)
        sink.write(chunk)
        await sink.drain()
        await asyncio.sleep(len(chunk) / self._bytes_per_s)
