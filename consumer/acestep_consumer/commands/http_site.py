# SPDX-License-Identifier: Apache-2.0
"""Serves an application at an address: for `listen` and `gateway`."""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


@asynccontextmanager
async def site(
    app: web.Application, host: str, port: int, *, close_s: float, cancel_abandoned: bool = False
) -> AsyncIterator[str]:
    """Serve ``app``; yields its URL, without a slash at the end. Raises ``OSError`` if the address cannot be bound.

    Args:
        app: the application.
        host: address to listen on.
        port: 0: any free one.
        close_s: how long open requests may take at the end.
        cancel_abandoned: cancel the handler of a request whose client has gone.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=close_s, handler_cancellation=cancel_abandoned)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def cannot_bind(host: str, port: int, error: OSError) -> str:
    """Return the message for an address that cannot be bound."""
    # asyncio's own text repeats the address; that of an unknown host name has no errno of the system.
    reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    return f"cannot listen on {host}:{port}: {reason}. Is another one running? --port 0 takes a free port"
