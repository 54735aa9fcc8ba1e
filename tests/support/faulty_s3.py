# SPDX-License-Identifier: Apache-2.0
"""A real S3 server behind an HTTP front that misbehaves on request."""

import asyncio
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import aiohttp
from aiohttp import web
from yarl import URL

from tests.support.waiting import eventually

Fault = Callable[[web.Request], web.Response | None]
"""Answers in the server's place, or returns None to let the request pass."""


def s3_error(status: int, code: str) -> web.Response:
    """Return an error as S3 words it."""
    return web.Response(status=status, body=f"<Error><Code>{code}</Code></Error>", content_type="application/xml")


@dataclass(eq=False)
class Hold:
    """Requests that wait until somebody lets them go on."""

    match: Callable[[web.Request], bool]
    answered: bool
    waiting: int = 0
    seen: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> None:
        self.seen += 1
        self.waiting += 1
        try:
            await self.over.wait()
        finally:
            self.waiting -= 1


class FaultyS3:
    """Forwards to the server at ``upstream``; the signature survives, because the Host header is forwarded too."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._faults: list[Fault] = []
        self._holds: list[Hold] = []
        self._lost: Callable[[web.Request], bool] = lambda _: False
        # Claim success where the condition failed. The header itself is signed and cannot be taken out.
        self.ignore_conditions = False
        self._cut: Callable[[web.Request], bool] = lambda _: False
        self._cut_after = self._cuts = 0
        self.requests: list[tuple[str, str]] = []
        self._headers: list[tuple[str, Mapping[str, str]]] = []
        self.endpoint = ""

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.endpoint = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._http.close()

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        """Misbehave as ``fault`` says within the block."""
        self._faults.append(fault)
        try:
            yield
        finally:
            self._faults.remove(fault)

    @contextmanager
    def hold(self, match: Callable[[web.Request], bool], *, answered: bool = False) -> Iterator[Hold]:
        """Keep requests that match waiting within the block.

        They do not reach the server before its end, and never once their client has gone: wait until none is
        ``waiting``. With ``answered`` they are carried out, and the answer waits.
        """
        hold = Hold(match, answered)
        self._holds.append(hold)
        try:
            yield hold
        finally:
            self._holds.remove(hold)
            hold.over.set()

    def lose_answer_once(self, to: Callable[[web.Request], bool]) -> None:
        """Carry the first matching request out, then drop the connection in place of the answer."""
        pending = [to]

        def lost(request: web.Request) -> bool:
            return bool(pending and pending[0](request) and pending.pop())

        self._lost = lost

    def lose_answers(self, to: Callable[[web.Request], bool]) -> None:
        """Carry requests that match out, then drop the connection in place of the answer; from now on."""
        self._lost = to

    def cut_answers(self, to: Callable[[web.Request], bool], *, after: int, times: int) -> None:
        """Drop the connection after so many bytes of the answers to the next ``times`` matching requests."""
        self._cut, self._cut_after, self._cuts = to, after, times

    def headers_of(self, method: str) -> list[Mapping[str, str]]:
        """The headers of all requests with that method."""
        return [headers for each, headers in self._headers if each == method]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        self._headers.append((request.method, request.headers))
        for fault in self._faults:
            answer = fault(request)
            if answer is not None:
                await request.read()
                return answer
        await self._held(request, answered=False)
        answer = await self._forward(request)
        await self._held(request, answered=True)
        if self._lost(request) and isinstance(request.transport, asyncio.Transport):
            request.transport.abort()
        if self._cuts and self._cut(request):
            self._cuts -= 1
            return await self._cut_off(request, answer)
        return answer

    async def _cut_off(self, request: web.Request, whole: web.Response) -> web.StreamResponse:
        assert isinstance(whole.body, bytes)
        assert isinstance(request.transport, asyncio.Transport)
        answer = web.StreamResponse(status=whole.status, headers=whole.headers)
        answer.content_length = len(whole.body)
        await answer.prepare(request)
        await answer.write(whole.body[: self._cut_after])
        await eventually(lambda: request.transport is None or not request.transport.get_write_buffer_size())
        request.transport.abort()
        return answer

    async def _held(self, request: web.Request, *, answered: bool) -> None:
        for hold in list(self._holds):
            if hold.answered is answered and hold.match(request):
                await hold.wait()

    async def _forward(self, request: web.Request) -> web.Response:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        async with self._http.request(
            request.method,
            URL(self._upstream + request.raw_path, encoded=True),
            headers=headers,
            data=io.BytesIO(await request.read()) if request.can_read_body else None,
            allow_redirects=False,
        ) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            if request.method != "HEAD":
                kept.pop("Content-Length", None)
            status = 200 if answer.status == _PRECONDITION_FAILED and self.ignore_conditions else answer.status
            return web.Response(status=status, headers=kept, body=await answer.read() or None)


_PRECONDITION_FAILED = 412
_HOP_BY_HOP = frozenset({"connection", "expect", "keep-alive", "transfer-encoding"})
