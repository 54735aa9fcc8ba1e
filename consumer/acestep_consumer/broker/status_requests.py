# SPDX-License-Identifier: Apache-2.0
"""Answers status requests: a message ``status`` on ``acestep.control`` makes every worker announce itself.

The answer goes to the events exchange and not to a ``reply_to``: RabbitMQ closes the connection over a malformed one.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from acestep_consumer.broker.errors import mapped
from acestep_consumer.broker.topology import CONTROL, RPC_TIMEOUT_S, STATUS, consume_own_queue

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from acestep_consumer.broker.connection import BrokerConnection

MIN_INTERVAL_S = 1.0

log = structlog.get_logger()


class StatusRequests:
    """Receives the requests on ``connection`` and calls ``announce``, once a second at most."""

    def __init__(self, connection: BrokerConnection, announce: Callable[[], Awaitable[None]]) -> None:
        self._connection = connection
        self._announce = announce
        self._announcing: asyncio.Task[None] | None = None
        self._last_s = -MIN_INTERVAL_S

    async def start(self) -> None:
        """Consume, on this channel and on every later one. Raises ``BrokerRefused``."""
        await self._connection.attach(self._consume)

    async def stop(self) -> None:
        """Answer no more."""
        self._connection.detach(self._consume)
        if self._announcing is not None:
            self._announcing.cancel()
            with suppress(asyncio.CancelledError):
                await self._announcing

    async def _consume(self, channel: Channel) -> None:
        with mapped():
            queue = await consume_own_queue(channel, self._on_request)
            await channel.queue_bind(queue, CONTROL, STATUS, timeout=RPC_TIMEOUT_S)

    async def _on_request(self, _: DeliveredMessage) -> None:
        if self._announcing is None or self._announcing.done():
            self._announcing = asyncio.create_task(self._answer(), name="status answer")

    async def _answer(self) -> None:
        await asyncio.sleep(max(0.0, self._last_s + MIN_INTERVAL_S - time.monotonic()))
        self._last_s = time.monotonic()
        try:
            await self._announce()
        except Exception:
            log.exception("status request not answered")
