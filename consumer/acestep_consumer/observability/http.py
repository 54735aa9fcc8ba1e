# SPDX-License-Identifier: Apache-2.0
"""The worker's pages over HTTP.

``/healthz`` says that the loop turns, ``/readyz`` that work can be done, ``/metrics`` is for Prometheus.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Self

from aiohttp import web

Check = Callable[[], Awaitable[bool]]
Exposition = Callable[[str], tuple[bytes, str]]
"""Makes the page of metrics: from the ``Accept`` header to body and content type."""

EngineStates = Callable[[], Mapping[str, Mapping[str, bool | int]]]
"""Tells of each engine, by name, whether it is ``ready`` and how many ``restarts`` it had."""


class HealthServer:
    """A small HTTP server. ``checks`` are named conditions; all must hold for readiness. ``engines`` are for people."""

    def __init__(
        self, checks: Mapping[str, Check], metrics: Exposition, host: str, port: int, *, engines: EngineStates = dict
    ) -> None:
        self._checks = dict(checks)
        self._metrics = metrics
        self._engines = engines
        self._host = host
        self._port = port
        app = web.Application()
        app.router.add_get("/healthz", self._live)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._measured)
        self._runner = web.AppRunner(app, access_log=None)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        """The port that was bound, also when a free one was asked for."""
        return int(self._runner.addresses[0][1])

    async def state(self) -> dict[str, bool]:
        """Evaluate every check; one that raises does not hold."""
        return {name: await _holds(check) for name, check in self._checks.items()}

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _ready(self, _: web.Request) -> web.Response:
        state = await self.state()
        ready = all(state.values())
        body = {"status": "ready" if ready else "not ready", "checks": state, "engines": self._engines()}
        return web.json_response(body, status=200 if ready else 503)

    async def _measured(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics(request.headers.get("Accept", ""))
        # As a header: aiohttp's own argument takes no parameters, and the format's version is one.
        return web.Response(body=body, headers={"Content-Type": content_type})


async def _holds(check: Check) -> bool:
    with suppress(Exception):  # whatever broke it, the answer is no
        return await check()
    return False
