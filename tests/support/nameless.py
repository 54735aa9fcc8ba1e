# SPDX-License-Identifier: Apache-2.0
"""A producer whose messages have no id."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

from acestep_consumer.broker.topology import REQUESTS

if TYPE_CHECKING:
    from tests.support.servers import ManagementApi


class Nameless:
    """Publishes without ids: AMQP clients give one to each message, the broker's HTTP API does not."""

    def __init__(self, management: ManagementApi, vhost: str) -> None:
        self._management = management
        self._vhost = vhost

    async def publish(self, body: bytes, **properties: Any) -> None:
        message = {
            "routing_key": "generate",
            "properties": {"delivery_mode": 2, **properties},
            "payload": base64.b64encode(body).decode(),
            "payload_encoding": "base64",
        }
        path = f"/api/exchanges/{self._vhost}/{REQUESTS}/publish"
        assert await asyncio.to_thread(self._management.call, "POST", path, message) == {"routed": True}

    async def request(self, prompt: str, **properties: Any) -> None:
        body = {"prompt": prompt, "audio_format": "wav", "audio_duration": 10}
        await self.publish(json.dumps(body).encode(), **properties)
