# SPDX-License-Identifier: Apache-2.0
"""A TCP server that answers the first bytes of each connection with fixed bytes, and closes it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AMQP = b"AMQP\x00\x00\x09\x01"
HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
TLS_ALERT = bytes.fromhex("15030300020246")


@asynccontextmanager
async def answering(answer: bytes | None) -> AsyncIterator[int]:
    """Yield the server's port on 127.0.0.1. ``answer`` None: it says nothing, and closes nothing."""
    ended = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)
        if answer is None:
            await ended.wait()
        else:
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        ended.set()
        server.close()
        await server.wait_closed()
