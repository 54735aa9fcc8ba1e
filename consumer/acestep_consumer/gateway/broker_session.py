# SPDX-License-Identifier: Apache-2.0
"""The gateway's session with the broker: publishes requests, receives events, watches the queue.

The gateway starts, and goes on, without a broker: requests are answered with 503 then, and ``/health`` as always.
Requests that come before the first connection has been made, or has failed, wait for that.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from acestep_consumer.broker.backoff import backoff
from acestep_consumer.client import Client, ClientError, NoQueue, Unreachable
from acestep_schemas.events import JobEvent, WorkerEvent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

PATIENCE_S: Final = 4.0
"""Longest wait for the broker's confirm: some clients give a request five seconds in all."""

POLL_S: Final = 1.0
STATUS_REQUEST_S: Final = 20.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0

log = structlog.get_logger()


class RequestClient(Protocol):
    """The client of the broker, as far as it is used here: ``acestep_consumer.client.Client``."""

    async def submit(self, request: Mapping[str, object], *, priority: int = 0, traceparent: str | None = None) -> str:
        """Publish a request. Raises ``ClientError``."""

    async def cancel(self, task_id: str) -> None:
        """Ask for a job to stop. Raises ``ClientError``."""

    async def waiting(self) -> int | None:
        """Return how many requests wait. Raises ``ClientError``."""

    async def request_statuses(self) -> None:
        """Ask the workers to announce themselves. Raises ``ClientError``."""

    def subscribe(self, *routing_keys: str) -> "AbstractAsyncContextManager[AsyncIterator[JobEvent | WorkerEvent]]":
        """Subscribe to events. Raises ``ClientError``."""


class BrokerSession:
    """Keeps a client connected.

    Args:
        connect: opens a client. Raises ``ClientError``.
        on_event: called with each event.
    """

    def __init__(
        self,
        connect: Callable[[], "AbstractAsyncContextManager[RequestClient]"],
        on_event: Callable[[JobEvent | WorkerEvent], None],
    ) -> None:
        self._connect = connect
        self._on_event = on_event
        self._client: RequestClient | None = None
        self._attempted = asyncio.Event()
        self._waiting: int | None = None
        self._accepted = 0
        self.is_up = False

    @property
    def queue_size(self) -> int:
        """Requests that wait: the broker's latest figure, and those accepted since; 0 where it is not known."""
        return (self._waiting or 0) + self._accepted

    async def run(self) -> None:
        """Connect, subscribe and watch, again and again, until cancelled."""
        for wait_s in backoff(FIRST_WAIT_S, LONGEST_WAIT_S):
            try:
                async with self._connected() as events, asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._watch_queue())
                    tasks.create_task(self._request_statuses())
                    async for event in events:
                        self._receive(event)
            except* (ClientError, OSError) as errors:
                log.warning("no events from the broker", reason=str(errors.exceptions[0]), again_in_s=round(wait_s, 1))
            self._attempted.set()
            await asyncio.sleep(wait_s)

    async def submit(self, request: Mapping[str, object], *, priority: int = 0, traceparent: str | None = None) -> None:
        """Publish a request. Raises ``ClientError``."""
        client = await self._first_attempt()
        await client.submit(request, priority=priority, traceparent=traceparent)
        self._accepted += 1

    async def cancel(self, task_id: str) -> None:
        """Ask for a job to stop. Raises ``ClientError``."""
        client = await self._first_attempt()
        await client.cancel(task_id)

    def _receive(self, event: JobEvent | WorkerEvent) -> None:
        """Take an event into account; one that cannot be must not keep the later ones from it."""
        try:
            self._on_event(event)
        except Exception:
            log.exception("event skipped", event_id=event.id, event_type=event.type)

    async def _first_attempt(self) -> RequestClient:
        """Return the client; a gateway that has just started connects first. Raises ``Unreachable``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self._attempted.wait()
        return self._current()

    def _current(self) -> RequestClient:
        if self._client is None:
            raise Unreachable("the broker is out of reach; nothing was sent")
        return self._client

    @asynccontextmanager
    async def _connected(self) -> "AsyncIterator[AsyncIterator[JobEvent | WorkerEvent]]":
        try:
            async with self._connect() as client, client.subscribe("job.#", "worker.#") as events:
                self._client, self.is_up = client, True
                self._attempted.set()
                log.info("subscribed to events")
                yield events
        finally:
            self._client, self.is_up = None, False

    async def _watch_queue(self) -> None:
        while True:
            try:
                before, self._accepted = self._accepted, 0
                self._waiting = await self._current().waiting()
                self.is_up = True
            except ClientError as error:
                self._accepted += before
                if self.is_up:
                    log.warning("broker out of reach", reason=str(error))
                self.is_up = False
            await asyncio.sleep(POLL_S)

    async def _request_statuses(self) -> None:
        while True:
            try:
                await self._current().request_statuses()
            except (Unreachable, NoQueue) as error:
                log.debug("workers not asked", reason=str(error))
            await asyncio.sleep(STATUS_REQUEST_S)


def client_of(url: str) -> Client:
    """Return the client to connect with: it gives up in time for clients with short patience."""
    return Client(url, patience_s=PATIENCE_S)
