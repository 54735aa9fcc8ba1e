# SPDX-License-Identifier: Apache-2.0
"""HTTPS servers on this machine with self-signed certificates: a well-behaved one, and one that sends raw bytes."""

import asyncio
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_NAME = "localhost"
OTHER_NAME = "inside.example"
"""A second name in the certificate. No DNS knows it: for resolvers of a test's own."""


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Create a certificate for ``localhost`` and ``OTHER_NAME``, and its key, valid for a day."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        "openssl", "req", "-x509", "-nodes", "-days", "1", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-subj", f"/CN={_NAME}", "-addext", f"subjectAltName=DNS:{_NAME},DNS:{OTHER_NAME}",
        "-keyout", f"{key}", "-out", f"{certificate}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


class HttpsServer:
    """Answers each path with the handler registered for it; ``hits`` lists the requested paths."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate = certificate
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(certificate, key)
        self._handlers: dict[str, Handler] = {}
        self.hits: list[str] = []
        self.host = ""

    @property
    def trust(self) -> ssl.SSLContext:
        """What a client needs to trust this server, and no other."""
        return ssl.create_default_context(cafile=str(self._certificate))

    def url(self, path: str) -> str:
        """Return the URL of ``path``."""
        return f"https://{self.host}{path}"

    def answer(self, path: str, handler: Handler) -> str:
        """Answer ``path`` with ``handler`` from now on; return the URL."""
        self._handlers[path] = handler
        return self.url(path)

    def serve(self, path: str, body: bytes, **arguments: str) -> str:
        """Answer ``path`` with ``body``; ``arguments`` are headers with underscores for hyphens. Return the URL."""
        headers = {name.replace("_", "-"): value for name, value in arguments.items()}

        async def handler(_: web.Request) -> web.StreamResponse:
            return web.Response(body=body, headers=headers)

        return self.answer(path, handler)

    def redirect(self, path: str, to: str) -> str:
        """Send whoever asks for ``path`` to ``to``; return the URL."""

        async def handler(_: web.Request) -> web.StreamResponse:
            return web.Response(status=302, headers={"Location": to})

        return self.answer(path, handler)

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls).start()
        self.host = f"{_NAME}:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.hits.append(request.path)
        handler = self._handlers.get(request.path)
        return await handler(request) if handler else web.Response(status=404)


class RawHttpsServer:
    """Answers every request with the bytes of ``answer``, then calls ``go_on`` or leaves the connection open.

    Without ``handshake`` it accepts connections and never sends anything.
    """

    def __init__(self, certificate: Path, key: Path, *, handshake: bool = True) -> None:
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if handshake else None
        if self._tls is not None:
            self._tls.load_cert_chain(certificate, key)
        self.trust = ssl.create_default_context(cafile=str(certificate))
        self.answer = b""
        self.go_on: Callable[[asyncio.StreamWriter], Awaitable[None]] | None = None
        self.requests: list[bytes] = []
        self.host = ""
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def url(self) -> str:
        """Return the URL of a file on it."""
        return f"https://{self.host}/a.wav"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.host = f"{_NAME}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._open.values():
            writer.transport.abort()
        if self._open:
            await asyncio.wait(set(self._open), timeout=10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        task.add_done_callback(self._open.pop)
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(self.answer)
            if self.go_on is not None:
                await self.go_on(writer)
            await reader.read()  # ends when the client leaves
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has left, which is what most tests are about
        finally:
            writer.close()
