# SPDX-License-Identifier: Apache-2.0
"""Who is there? A message ``status`` on ``acestep.control`` makes every worker announce itself on the events exchange.

Not answered one by one: a ``reply_to`` is a stranger's text, and a malformed one costs the connection.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

from acestep_consumer.broker.errors import mapped
from acestep_consumer.broker.topology import CONTROL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from acestep_consumer.broker.connection import BrokerConnection

STATUS = "status"
RPC_TIMEOUT_S = 10.0
# However often somebody asks.
AT_MOST_EVERY_S = 1.0


class StatusRequests:
    """Hears the question on ``link`` and calls ``announce``, once a second at most."""

    def __init__(self, link: BrokerConnection, announce: Callable[[], Awaitable[None]]) -> None:
        self._link = link
        self._announce = announce
        self._announcing: asyncio.Task[None] | None = None
        self._last_s = -AT_MOST_EVERY_S

    async def start(self) -> None:
        """Listen, on this channel and on every later one. Raises ``BrokerRefused``."""
        await self._link.attach(self._listen)

    async def stop(self) -> None:
        """Answer no more."""
        self._link.detach(self._listen)
        if self._announcing is not None:
            self._announcing.cancel()
            with suppress(asyncio.CancelledError):
                await self._announcing

    async def _listen(self, channel: Channel) -> None:
        with mapped():
            # Named by us: a login may be allowed what begins with `acestep.`, and no more.
            queue = f"{CONTROL}.{uuid4().hex}"
            await channel.queue_declare(queue, exclusive=True, auto_delete=True, timeout=RPC_TIMEOUT_S)
            await channel.queue_bind(queue, CONTROL, STATUS, timeout=RPC_TIMEOUT_S)
            await channel.basic_consume(queue, self._hear, no_ack=True, timeout=RPC_TIMEOUT_S)

    async def _hear(self, _: DeliveredMessage) -> None:
        if self._announcing is None or self._announcing.done():
            self._announcing = asyncio.create_task(self._answer(), name="roll call")

    async def _answer(self) -> None:
        await asyncio.sleep(max(0.0, self._last_s + AT_MOST_EVERY_S - time.monotonic()))
        self._last_s = time.monotonic()
        await self._announce()
