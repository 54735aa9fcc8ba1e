# SPDX-License-Identifier: Apache-2.0
"""Fault: broker and storage fail over to other machines, and their names lead to new addresses."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from yarl import URL

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.objects import ObjectAddress, ObjectContent
from acestep_consumer.storage.s3.objects import S3Objects
from tests.support.broker import broker_settings
from tests.support.waiting import eventually

if TYPE_CHECKING:
    import pytest

    from infra.local.s3 import SeaweedFS

NAME = "service.test"
BEFORE, AFTER = "127.0.0.2", "127.0.0.3"


class Relay:
    """Forwards one port of an address to a server, until it closes for good."""

    def __init__(self, address: str, target: str) -> None:
        self._address = address
        parts = urlsplit(target)
        self._target = parts.hostname, parts.port
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self, port: int = 0) -> int:
        """Listen, and return the port."""
        self._server = await asyncio.start_server(self._forward, self._address, port)
        opened: int = self._server.sockets[0].getsockname()[1]
        return opened

    def close(self) -> None:
        """Stop listening and end all connections."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, far_writer}
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(1 << 16):
            writer.write(chunk)
            await writer.drain()
    writer.close()


async def test_broker_and_storage_are_found_where_their_names_lead_after_a_fail_over(
    amqp_url: str, s3: SeaweedFS, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, resolve = [BEFORE], socket.getaddrinfo

    def resolved(host: Any, *arguments: Any, **options: Any) -> Any:
        return resolve(address[0] if host in (NAME, NAME.encode()) else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    async with AsyncExitStack() as stack:
        ports = []
        first = [Relay(BEFORE, target) for target in (amqp_url, s3.endpoint)]
        for relay in first:
            stack.callback(relay.close)
            ports.append(await relay.open())
        url = str(URL(amqp_url).with_host(NAME).with_port(ports[0]))
        settings = StorageSettings(endpoint=f"http://{NAME}:{ports[1]}", bucket=s3.bucket)
        session = boto3.Session(s3.access_key, s3.secret_key, region_name="us-east-1")
        objects = await stack.enter_async_context(S3Objects(settings, session=session, retry_s=60))
        connection = await stack.enter_async_context(BrokerConnection(broker_settings(url), "worker"))
        place = ObjectAddress(s3.bucket, f"{s3_prefix}/kept")
        await objects.put(place, ObjectContent.of(b"kept", "text/plain"))

        address[0] = AFTER
        for relay in first:
            relay.close()
        await eventually(lambda: not connection.is_up)
        for target, port in zip((amqp_url, s3.endpoint), ports, strict=True):
            relay = Relay(AFTER, target)
            stack.callback(relay.close)
            await relay.open(port)
        await eventually(lambda: connection.is_up)
        found = await objects.get(place)
        assert found is not None
        assert found.body == b"kept"
