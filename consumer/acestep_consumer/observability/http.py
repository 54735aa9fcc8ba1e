# SPDX-License-Identifier: Apache-2.0
"""HTTP endpoints of a worker: ``/healthz`` (liveness), ``/readyz`` (readiness) and ``/metrics`` (Prometheus)."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Self

from aiohttp import web

Check = Callable[[], bool]
"""Returns whether a condition holds, from what the worker knows: a probe must not wait for a server."""

Exposition = Callable[[str], tuple[bytes, str]]
"""Returns body and content type of the metrics page for an ``Accept`` header."""

EngineStates = Callable[[], Mapping[str, Mapping[str, bool | int]]]
"""Returns ``ready`` and ``restarts`` of each engine by name."""


class HealthServer:
    """Serves the endpoints.

    Args:
        checks: the conditions of readiness, by name; all must hold.
        metrics: renders the metrics page.
        host: address to listen on.
        port: 0: a free one.
        engines: more about the engines, for people.
    """

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
        app.router.add_get("/metrics", self._metrics_page)
        self._runner = web.AppRunner(app, access_log=None)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        """The port that is bound."""
        return int(self._runner.addresses[0][1])

    def state(self) -> dict[str, bool]:
        """Evaluate every check; one that raises counts as failed."""
        return {name: _holds(check) for name, check in self._checks.items()}

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _ready(self, _: web.Request) -> web.Response:
        state = self.state()
        ready = all(state.values())
        body = {"status": "ready" if ready else "not ready", "checks": state, "engines": self._engines()}
        return web.json_response(body, status=200 if ready else 503)

    async def _metrics_page(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics(request.headers.get("Accept", ""))
        # As a header: aiohttp's argument takes no parameters, and the format's version is one.
        return web.Response(body=body, headers={"Content-Type": content_type})


def _holds(check: Check) -> bool:
    with suppress(Exception):  # whatever the error, the check fails
        return check()
    return False
