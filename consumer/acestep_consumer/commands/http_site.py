# SPDX-License-Identifier: Apache-2.0
"""Serves an application at an address: for `listen` and `gateway`."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

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


async def run_until_stopped(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run these until SIGTERM or until one fails, and raise its error."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    tasks: set[asyncio.Task[Any]] = {asyncio.create_task(coroutine) for coroutine in (*coroutines, stop.wait())}
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def cannot_bind(host: str, port: int, error: OSError) -> str:
    """Return the message for an address that cannot be bound."""
    # asyncio's own text repeats the address; that of an unknown host name has no errno of the system.
    reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    return f"cannot listen on {host}:{port}: {reason}. Is another one running? --port 0 takes a free port"
