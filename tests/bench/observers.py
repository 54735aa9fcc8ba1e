# SPDX-License-Identifier: Apache-2.0
"""Those who look at a worker in a benchmark: one scrapes its metrics, one takes its spans (OTLP), a file takes its log.

They are in the benchmark's process: what they take is not counted as the worker's. Afterwards they tell whether all
that the worker did was seen.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from typing import BinaryIO, Self

import aiohttp
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from infra.local.ports import LOOPBACK, PortClaim

_COMPLETED = re.compile(rb'^acestep_jobs_total\{[^}]*state="completed"[^}]*\} ([0-9.]+)$', re.MULTILINE)
_LARGEST_EXPORT = 64 << 20


class Observers:
    """An async context manager; one for each process that is looked at."""

    def __init__(self) -> None:
        self._claim = PortClaim(1)
        self._exports: list[bytes] = []
        self.log: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        self.scrapes = 0
        self.counted = 0
        """Jobs that were completed, by the last scrape."""

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=_LARGEST_EXPORT)
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, LOOPBACK, 0).start()
        self._http = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
        await self._runner.cleanup()
        self._claim.release()
        self.log.close()

    @property
    def variables(self) -> dict[str, str]:
        """What the worker's environment needs for it."""
        return {
            "BENCH_HTTP_PORT": str(self._claim.ports[0]),
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{LOOPBACK}:{self._runner.addresses[0][1]}",
        }

    async def attend(self, process: asyncio.subprocess.Process) -> None:
        """Follow the worker's stretches: scrape once within each that has everything on, and once after it."""
        assert process.stdout is not None
        assert process.stdin is not None
        word, was_on = b"", False
        while word != b"done":
            word = (await process.stdout.readline()).strip()
            if not word:
                return  # it broke off; its end says why
            if was_on:
                await self._scrape()
            was_on = word == b"on"
            process.stdin.write(b"\n")
            await process.stdin.drain()
            if was_on:
                await self._scrape()

    async def _scrape(self) -> None:
        async with self._http.get(f"http://{LOOPBACK}:{self._claim.ports[0]}/metrics") as answer:
            text = await answer.read()
        self.scrapes += 1
        self.counted = round(sum(float(count) for count in _COMPLETED.findall(text)))

    async def _take(self, request: web.Request) -> web.Response:
        self._exports.append(await request.read())
        return web.Response()

    def logged(self) -> set[str]:
        """Return what was logged, without the particulars. Raises ``ValueError`` unless each line is JSON."""
        self.log.seek(0)
        return {str(json.loads(line)["event"]) for line in self.log}

    def spans(self) -> int:
        """Return how many different spans came."""
        return len(
            {
                (span.trace_id, span.span_id)
                for export in self._exports
                for resource in ExportTraceServiceRequest.FromString(export).resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            }
        )
