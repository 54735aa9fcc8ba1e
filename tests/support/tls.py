# SPDX-License-Identifier: Apache-2.0
"""TLS for tests: an authority of one's own, a broker with its certificate, and TLS in front of any port."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trustme

from infra.local.ports import LOOPBACK, PortClaim
from infra.local.rabbitmq import RabbitMQ

NAME = "localhost"
_HANDSHAKE = 0x16
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Certificate:
    """PEM files of a server's certificate: the chain, and its key."""

    chain: Path
    key: Path

    @property
    def context(self) -> ssl.SSLContext:
        """What a server needs to show it."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.chain, self.key)
        return context


class Authority:
    """A certificate authority. ``bundle`` is the PEM file that those trust who trust it."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.bundle = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.bundle))

    def certificate(self, name: str = NAME) -> Certificate:
        """Make a certificate for a host name, or an address."""
        issued = self._ca.issue_cert(name)
        found = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        found.key.touch(mode=0o600)
        issued.private_key_pem.write_to_path(str(found.key))
        found.chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return found


class TlsRabbitMQ(RabbitMQ):
    """A broker that listens with TLS as well, on ``tls_port``."""

    def __init__(self, folder: Path, certificate: Certificate, authority: Authority) -> None:
        super().__init__(folder)
        self._tls_claim = PortClaim(1)
        self.tls_port = self._tls_claim.ports[0]
        # Copies in its own folder: a RabbitMQ 4 in a root of its own sees no other.
        self._files = {"cacertfile": authority.bundle, "certfile": certificate.chain, "keyfile": certificate.key}
        named = "".join(f"ssl_options.{option} = {self.folder / option}\n" for option in self._files)
        self._lines = (
            f"listeners.ssl.default = {LOOPBACK}:{self.tls_port}\n{named}"
            "ssl_options.verify = verify_none\n"
            "ssl_options.fail_if_no_peer_cert = false\n"
        )

    def tls_url(self, **query: object) -> str:
        """Return the URL of the default virtual host, as guest; ``query`` is added."""
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        return f"amqps://guest:guest@{NAME}:{self.tls_port}/%2F" + (f"?{asked}" if asked else "")

    def close(self) -> None:
        """End it for good."""
        super().close()
        self._tls_claim.release()

    def _write_files(self) -> None:
        super()._write_files()
        for option, path in self._files.items():
            shutil.copyfile(path, self.folder / option)
        with (self.folder / "rabbitmq.conf").open("a") as file:
            file.write(self._lines)


class Front:
    """Listens on a port of its own and passes on to ``port``: with TLS, which ends here, or untouched without.

    ``openings`` has the first byte of each connection as it came over the wire; only untouched ones are recorded.
    """

    def __init__(self, port: int, certificate: Certificate | None) -> None:
        self._target = port
        self._tls = certificate.context if certificate else None
        self._tasks: set[asyncio.Task[None]] = set()
        self.openings: list[int] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, 0, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def spoke_only_tls(self) -> bool:
        """Whether somebody came, and nobody said anything but the beginning of a TLS handshake."""
        return set(self.openings) == {_HANDSHAKE}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(OSError, asyncio.CancelledError):
            there, away = await asyncio.open_connection(LOOPBACK, self._target)
            try:
                await asyncio.gather(self._pass_on(reader, away, outward=True), self._pass_on(there, writer))
            finally:
                away.close()
        writer.close()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, outward: bool = False
    ) -> None:
        first = outward and self._tls is None
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if first:
                    self.openings.append(data[0])
                    first = False
                writer.write(data)
                await writer.drain()
        writer.close()
