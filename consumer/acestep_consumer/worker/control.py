# SPDX-License-Identifier: Apache-2.0
"""Control connection of a worker: cancellations, dead-letter notices, status requests, workers of the same id.

It is a connection of its own: reading a week of cancellations takes a second, and nothing else should wait for that.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Self

from acestep_consumer.broker.cancellations import CancellationLog
from acestep_consumer.broker.connection import UNUSED_CLOSE_TIMEOUT_S, BrokerConnection
from acestep_consumer.broker.dead_letter_notices import DeadLetterNotices, NoticeHandler
from acestep_consumer.broker.duplicate_ids import DuplicateIdCheck
from acestep_consumer.broker.status_requests import StatusRequests
from acestep_consumer.config.settings import BrokerSettings


class ControlChannel:
    """The connection and its consumers. Entering returns once all cancellations of the last week have been read."""

    def __init__(self, settings: BrokerSettings, name: str) -> None:
        """``name`` is what the broker lists the connection under."""
        self._settings = settings
        self._listeners = AsyncExitStack()
        self.connection = BrokerConnection(settings, name)
        self.cancellations = CancellationLog(self.connection)

    async def __aenter__(self) -> Self:
        await self.connection.__aenter__()
        self._listeners.push_async_callback(self.cancellations.stop)
        await self.cancellations.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop_listening()
        await self.connection.close(UNUSED_CLOSE_TIMEOUT_S)

    async def listen(self, tell: NoticeHandler, announce: Callable[[], Awaitable[None]], worker_id: str) -> None:
        """Pass dead-letter notices to ``tell``, status requests to ``announce``; look for workers of the same id.

        Raises:
            BrokerRefused: the login may not.
        """
        link = self.connection
        listeners = (
            DeadLetterNotices(link, self._settings, tell),
            StatusRequests(link, announce),
            DuplicateIdCheck(link, worker_id),
        )
        for listener in listeners:
            await listener.start()
            self._listeners.push_async_callback(listener.stop)

    async def stop_listening(self) -> None:
        """Take no more, and let running notices end; harmless when repeated."""
        await self._listeners.aclose()
