# SPDX-License-Identifier: Apache-2.0
"""Owns what tests need from the local servers beyond their life: virtual hosts, made and removed in milliseconds."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.management import ManagementClient
from tests.support.broker import broker_settings

if TYPE_CHECKING:
    from infra.local.rabbitmq import RabbitMQ


class ManagementApi:
    """RabbitMQ's HTTP API, as far as tests use it: rabbitmqctl does the same a hundred times slower."""

    def __init__(self, broker: RabbitMQ) -> None:
        self._settings = broker_settings("amqp://guest:guest@localhost", management_url=broker.management_url)

    def add_vhost(self, vhost: str) -> None:
        """Make a virtual host that guest may use."""
        self.call("PUT", f"/api/vhosts/{quote(vhost, safe='')}")
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.call("PUT", f"/api/permissions/{quote(vhost, safe='')}/guest", everything)

    def delete_vhost(self, vhost: str) -> None:
        """Remove a virtual host with all its queues; connections to it are closed."""
        self.call("DELETE", f"/api/vhosts/{quote(vhost, safe='')}")

    def close_connections(self, vhost: str) -> int:
        """Close every connection to a virtual host, as an operator would; how many there were."""
        connections = self.call("GET", f"/api/vhosts/{quote(vhost, safe='')}/connections")
        for connection in connections:
            with suppress(BrokerRefused):  # it has gone meanwhile
                self.call("DELETE", f"/api/connections/{quote(connection['name'], safe='')}")
        return len(connections)

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Send one request and return the answer's JSON, or None when it has no body.

        Raises:
            BrokerError: the API refused, or did not answer.
        """
        # In a thread, because most callers are inside an event loop.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._call(method, path, body)).result()

    async def _call(self, method: str, path: str, body: object) -> Any:
        async with ManagementClient(self._settings) as client:
            return await client.call(method, path, body)
