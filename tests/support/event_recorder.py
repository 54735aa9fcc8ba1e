# SPDX-License-Identifier: Apache-2.0
"""Records all events of jobs, as a careful subscriber does: from a durable queue of its own, each as it came."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from typing import TYPE_CHECKING, Any, Self

import aio_pika
from aio_pika.exceptions import AMQPError
from yarl import URL

from acestep_consumer.broker.topology import EVENTS
from acestep_consumer.config.amqp_urls import split_urls
from acestep_schemas.events import JobState
from tests.support.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aio_pika.abc import AbstractIncomingMessage

_AGAIN_S = 0.2
_AT_ONCE = 100


@dataclass(frozen=True)
class RecordedEvent:
    """One event as it came. ``at`` is a time of the monotonic clock."""

    state: str
    task_id: str
    body: bytes
    at: float = field(compare=False)

    @cached_property
    def cloud_event(self) -> dict[str, Any]:
        """The CloudEvent."""
        event: dict[str, Any] = json.loads(self.body)
        return event

    @property
    def data(self) -> dict[str, Any]:
        """Its data."""
        data: dict[str, Any] = self.cloud_event["data"]
        return data

    @property
    def terminal(self) -> bool:
        """Whether the job ended with it."""
        return JobState(self.state).terminal


class EventRecorder:
    """Records all events of jobs. Its queue survives the broker and the connection, and it reconnects.

    Of a cluster, ``url`` names the nodes, comma-separated, and ``queue_type`` is ``quorum``.
    """

    def __init__(self, url: str, queue_type: str = "classic") -> None:
        self._urls = cycle(split_urls(url))
        self._queue_type = queue_type
        self._queue = f"event-recorder-{uuid.uuid4().hex}"
        self._listening = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.events: list[RecordedEvent] = []
        self.lost = 0
        """How often its connection was lost."""

    def of(self, task_id: str) -> list[RecordedEvent]:
        """All events of one job, in the order in which they came."""
        return [event for event in self.events if event.task_id == task_id]

    def states(self, task_id: str) -> list[str]:
        """The states of one job's events."""
        return [event.state for event in self.of(task_id)]

    def terminal(self, task_id: str) -> list[RecordedEvent]:
        """The terminal events of one job."""
        return [event for event in self.of(task_id) if event.terminal]

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._keep_listening(), name="event recorder")
        async with asyncio.timeout(WITHIN_S):
            await self._listening.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_listening(self) -> None:
        while True:
            try:
                await self._listen()
            except (AMQPError, OSError, RuntimeError):
                await asyncio.sleep(_AGAIN_S)

    async def _listen(self) -> None:
        """Listen until the connection is gone."""
        gone = asyncio.Event()
        connection = aio_pika.Connection(URL(next(self._urls)), client_properties={"connection_name": "event recorder"})
        # Closed also when it could not be opened: else its destructor tries to, without an event loop.
        async with _closing(connection):
            await connection.connect(timeout=10)
            connection.close_callbacks.add(lambda *_: gone.set())
            channel = await connection.channel()
            channel.close_callbacks.add(lambda *_: gone.set())
            await channel.set_qos(_AT_ONCE)
            queue = await channel.declare_queue(self._queue, durable=True, arguments={"x-queue-type": self._queue_type})
            await queue.bind(EVENTS, "job.#")
            await queue.consume(self._take)
            self._listening.set()
            await gone.wait()
            self.lost += 1

    async def _take(self, message: AbstractIncomingMessage) -> None:
        _, state, task_id = (message.routing_key or "").split(".", 2)
        self.events.append(RecordedEvent(state, task_id, message.body, time.monotonic()))
        with suppress(AMQPError, OSError, RuntimeError):  # it is redelivered then, with the same content
            await message.ack()


@asynccontextmanager
async def _closing(connection: aio_pika.Connection) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await connection.close()
