# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy that breaks connections on purpose: cut, stalled, slowed, or dropped after so many bytes."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Self
from urllib.parse import urlsplit, urlunsplit

_CHUNK = 64 * 1024
_GREETING_BYTES = 4096
_LOOPBACK = "127.0.0.1"


class Direction(Enum):
    """Which way bytes go."""

    UP = "to the server"
    DOWN = "to the client"


@dataclass(frozen=True, slots=True)
class Where:
    """A part of the traffic; by default all of it.

    Attributes:
        direction: one way only.
        of: only connections whose client said this among its first bytes. AMQP clients say their connection's name.
    """

    direction: Direction | None = None
    of: bytes = b""


EVERYWHERE = Where()
NOWHERE: Where | None = None


class _Connection:
    """A client's connection and the one to the server that goes with it."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.sinks = {Direction.UP: far, Direction.DOWN: near}
        self.abandoned = False
        self._greeting = b""

    def note(self, chunk: bytes) -> None:
        """Remember what the client says first."""
        self._greeting += chunk[: _GREETING_BYTES - len(self._greeting)]

    def said(self, words: bytes) -> bool:
        return words in self._greeting

    def abort(self) -> None:
        for sink in self.sinks.values():
            sink.transport.abort()


class Proxy:
    """Forwards a port of 127.0.0.1 to ``host:port``.

    Faults act on connections that are open and on later ones alike, until ``heal``. Bytes are never changed.
    """

    def __init__(self, host: str, port: int, *, listen_port: int = 0) -> None:
        self._target = (host, port)
        self._port = listen_port
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()
        self._changed = asyncio.Event()
        self._stalled: Where | None = NOWHERE
        self._refusing = False
        self._bytes_per_s = math.inf
        self._doomed = EVERYWHERE
        self._budget = math.inf
        self.held = 0
        """Bytes that came in and do not go on, because of ``stall``."""
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
        return len(self._connections)

    def url(self, url: str) -> str:
        """Return ``url`` with its host and port replaced by the proxy's."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}{_LOOPBACK}:{self._port}"))

    def cut(self, of: bytes = b"") -> int:
        """Reset every open connection, or those ``of`` a client that said so; later ones pass. How many there were."""
        doomed = [connection for connection in self._connections if connection.said(of)]
        for connection in doomed:
            connection.abort()
        return len(doomed)

    def refuse(self) -> None:
        """Reset what is open, and whatever connects from now on."""
        self._refusing = True
        self.cut()

    def stall(self, where: Where = EVERYWHERE) -> None:
        """Keep connections open, and pass nothing on."""
        self._stalled = where
        self._changed.set()

    def abandon(self) -> int:
        """Pass nothing on any more over what is open now, and tell neither side; later ones pass. How many there were.

        So it is with a connection whose far end lost its power.
        """
        for connection in self._connections:
            connection.abandoned = True
        return self.open

    def slow(self, bytes_per_s: float) -> None:
        """Pass at most so many bytes a second, in each direction of each connection."""
        self._bytes_per_s = bytes_per_s

    def drop_after(self, count: int, where: Where = EVERYWHERE) -> None:
        """Cut everything once ``count`` more bytes have passed; ``where``: only these count, only these are cut."""
        self._doomed = where
        self._budget = count

    def heal(self) -> None:
        """Pass everything again."""
        self._refusing = False
        self._bytes_per_s = math.inf
        self._budget = math.inf
        self._stalled = NOWHERE
        for connection in self._connections:
            connection.abandoned = False
        self._changed.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, _LOOPBACK, self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
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
        connection = _Connection(writer, far_writer)
        self._connections.add(connection)
        for source, direction in ((reader, Direction.UP), (far_reader, Direction.DOWN)):
            pipe = asyncio.create_task(self._pipe(source, connection, direction))
            self._pipes.add(pipe)
            pipe.add_done_callback(self._pipes.discard)

    async def _pipe(self, source: asyncio.StreamReader, connection: _Connection, direction: Direction) -> None:
        try:
            with suppress(OSError):
                while chunk := await source.read(_CHUNK):
                    if direction is Direction.UP:
                        connection.note(chunk)
                    await self._pass(chunk, connection, direction)
        finally:
            connection.sinks.pop(direction).close()
            if not connection.sinks:
                self._connections.discard(connection)

    async def _pass(self, chunk: bytes, connection: _Connection, direction: Direction) -> None:
        await self._flowing(len(chunk), connection, direction)
        sink = connection.sinks[direction]
        if _covers(self._doomed, connection, direction):
            if len(chunk) > self._budget:
                sink.write(chunk[: int(self._budget)])
                self._budget = math.inf
                self.cut(self._doomed.of)
                return
            self._budget -= len(chunk)
        sink.write(chunk)
        await sink.drain()
        await asyncio.sleep(len(chunk) / self._bytes_per_s)

    async def _flowing(self, count: int, connection: _Connection, direction: Direction) -> None:
        """Wait until nothing stalls this connection this way."""
        if not self._is_stalled(connection, direction):
            return
        self.held += count
        try:
            while self._is_stalled(connection, direction):
                self._changed.clear()
                await self._changed.wait()
        finally:
            self.held -= count

    def _is_stalled(self, connection: _Connection, direction: Direction) -> bool:
        return connection.abandoned or _covers(self._stalled, connection, direction)


def _covers(where: Where | None, connection: _Connection, direction: Direction) -> bool:
    return where is not None and where.direction in (None, direction) and connection.said(where.of)
