# SPDX-License-Identifier: Apache-2.0
"""What a worker hears besides requests: cancellations, requests that the broker gave up, and the question who is there.

All of it on a connection of its own: reading a week of cancellations takes a second, and nothing shall wait for that.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from acestep_consumer.broker.cancellations import CancellationLog
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.dead_letter_notices import DeadLetterNotices, NoticeHandler
from acestep_consumer.broker.status_requests import StatusRequests
from acestep_consumer.config.settings import BrokerSettings


class ControlChannel:
    """The connection and its listeners. Entering it returns when every cancellation of the last week is known."""

    def __init__(self, settings: BrokerSettings, name: str) -> None:
        """``name`` is what the broker lists the connection under."""
        self._settings = settings
        self._stack = AsyncExitStack()
        self.link = BrokerConnection(settings, name)
        self.cancellations = CancellationLog(self.link)

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.link)
        await self.cancellations.start()
        self._stack.push_async_callback(self.cancellations.stop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def attend(self, tell: NoticeHandler, announce: Callable[[], Awaitable[None]]) -> None:
        """Hand notices to ``tell`` from now on, and call ``announce`` when somebody asks. Raises ``BrokerRefused``."""
        for listener in (DeadLetterNotices(self.link, self._settings, tell), StatusRequests(self.link, announce)):
            await listener.start()
            self._stack.push_async_callback(listener.stop)
