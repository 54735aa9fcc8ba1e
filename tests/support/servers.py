# SPDX-License-Identifier: Apache-2.0
"""Owns what tests need from the local servers beyond their life: virtual hosts, made and removed in milliseconds."""

from __future__ import annotations

import base64
import http.client
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from infra.local.rabbitmq import RabbitMQ

_CREDENTIALS = base64.b64encode(b"guest:guest").decode()


class ManagementApi:
    """RabbitMQ's HTTP API, as far as tests use it: rabbitmqctl does the same a hundred times slower."""

    def __init__(self, broker: RabbitMQ) -> None:
        self._host = urlsplit(broker.management_url).netloc

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
            self.call("DELETE", f"/api/connections/{quote(connection['name'], safe='')}")
        return len(connections)

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Send one request and return the answer's JSON, or None when it has no body.

        Raises:
            AssertionError: the API answered with an error status.
        """
        connection = http.client.HTTPConnection(self._host, timeout=30)
        headers = {"Authorization": f"Basic {_CREDENTIALS}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, body=None if body is None else json.dumps(body), headers=headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        assert answer.status < http.HTTPStatus.BAD_REQUEST, f"{method} {path}: {answer.status} {text!r}"
        return json.loads(text) if text else None
