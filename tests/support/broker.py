# SPDX-License-Identifier: Apache-2.0
"""The other side of the worker's queues: a producer and a subscriber, on plain aio-pika, and sample events."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import aio_pika

from acestep_consumer.broker.topology import CONTROL, EVENTS, REQUESTS
from acestep_consumer.config.settings import BrokerSettings
from acestep_schemas.events import (
    ErrorCode,
    ErrorReport,
    JobProgress,
    Progress,
    TerminalEvent,
    Unfinished,
    unfinished_event,
)
from tests.support.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aio_pika.abc import AbstractConnection, AbstractIncomingMessage

_POLL_S = 0.02
API_POLL_S = 0.2
"""Between two looks at the management API, whose figures are seconds old and which costs both sides more than AMQP."""


async def until(
    check: Callable[[], Awaitable[bool]], what: str, within_s: float = WITHIN_S, *, every_s: float = _POLL_S
) -> None:
    """Poll a question to the broker until the answer is yes; fail with ``what`` after ``within_s`` seconds."""
    deadline = time.monotonic() + within_s
    while not await check():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(every_s)


def broker_settings(url: str, **values: Any) -> BrokerSettings:
    """Return settings for the broker at ``url``; ``values`` override fields by name."""
    return BrokerSettings.model_validate({"urls": url, **values})


def progress_event(task_id: str, sequence: int) -> JobProgress:
    """Return a progress event."""
    data = Progress(task_id=task_id, progress=0.5, stage="render", sequence=sequence)
    return JobProgress.of(data, attempt=1, worker_id="w1")


def failed_event(task_id: str) -> TerminalEvent:
    """Return a terminal event, the smallest there is."""
    error = ErrorReport(code=ErrorCode.RENDER_FAILED, message="no", retryable=False, attempts=1)
    data = Unfinished(
        task_id=task_id, status="failed", attempt=1, worker_id="w1", finished_at=datetime.now(UTC), error=error
    )
    return unfinished_event(data)


class Peer:
    """A client of the broker that is not the worker."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: AbstractConnection | None = None

    async def __aenter__(self) -> Self:
        self._connection = await aio_pika.connect(self._url)
        self.channel = await self._connection.channel(on_return_raises=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._connection is not None
        await self._connection.close()

    async def request(self, body: bytes, **properties: Any) -> None:
        """Publish a request. Raises aio-pika's ``DeliveryError`` when the queue is full."""
        exchange = await self.channel.get_exchange(REQUESTS, ensure=False)
        await exchange.publish(aio_pika.Message(body, **properties), "generate", timeout=10)

    async def submit(self, **fields: Any) -> None:
        """Publish a request for a small song, or what ``fields`` say, under the id in them."""
        body = {"prompt": "x", "audio_format": "wav", "audio_duration": 10, **fields}
        await self.request(json.dumps(body).encode(), message_id=body["task_id"], delivery_mode=2)

    async def cancel(self, task_id: str) -> None:
        """Ask for the end of a task."""
        exchange = await self.channel.get_exchange(CONTROL, ensure=False)
        await exchange.publish(aio_pika.Message(b"", timestamp=datetime.now(UTC)), f"cancel.{task_id}")

    async def subscribe(self, pattern: str, **arguments: Any) -> str:
        """Bind a new queue to the events exchange; its name."""
        queue = await self.channel.declare_queue(auto_delete=False, exclusive=True, arguments=arguments)
        await queue.bind(EVENTS, pattern)
        return queue.name

    async def take(self, queue: str, within_s: float = WITHIN_S) -> AbstractIncomingMessage:
        """Take one message and ack it; wait for it."""
        found = await self.look(queue, within_s)
        await found.ack()
        return found

    async def look(self, queue: str, within_s: float = WITHIN_S) -> AbstractIncomingMessage:
        """Get one message without acking it; wait for it."""
        source = await self.channel.get_queue(queue, ensure=False)
        found: list[AbstractIncomingMessage] = []

        async def got() -> bool:
            message = await source.get(fail=False)
            found.extend([message] if message else [])
            return bool(found)

        await until(got, f"a message in {queue}", within_s)
        return found[0]

    async def ready(self, queue: str) -> int:
        """How many messages are ready in ``queue``: those in a consumer's hands do not count."""
        declared = await self.channel.declare_queue(queue, passive=True)
        count = declared.declaration_result.message_count
        assert count is not None
        return count
