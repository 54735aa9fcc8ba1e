# SPDX-License-Identifier: Apache-2.0
"""The client without ``async``: for scripts, the REPL and notebooks.

>>> from acestep_consumer.client.sync import Client
>>> with Client() as client:
...     files = client.start({"prompt": "slow jazz"}).result("songs")

It runs the asynchronous client in a thread of its own, so the connection lives on while the program computes or waits
for somebody to type, and a notebook's own event loop does not matter. Errors are those of ``acestep_consumer.client``.
"""

import asyncio
import atexit
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from acestep_consumer import client as asynchronous
from acestep_consumer.client.errors import (
    ClientError,
    DownloadFailed,
    InvalidTaskId,
    NoQueue,
    NoSongs,
    NotEndedYet,
    QueueFull,
    Unreachable,
)
from acestep_consumer.client.estimate import QueueEstimate as Outlook
from acestep_schemas.events import JobEvent, TerminalEvent, WorkerEvent

if TYPE_CHECKING:
    from acestep_consumer.config.settings import StorageSettings

T = TypeVar("T")

__all__ = [
    "Client",
    "ClientError",
    "DownloadFailed",
    "InvalidTaskId",
    "Job",
    "NoQueue",
    "NoSongs",
    "NotEndedYet",
    "Outlook",
    "QueueFull",
    "Unreachable",
]


class SyncClient:
    """The same methods and arguments as ``acestep_consumer.client.Client``. Connects when it is made.

    Use it with ``with``, or call ``close`` at the end. Threads may share it.
    """

    def __init__(
        self, url: str | None = None, *, storage: "StorageSettings | None" = None, patience_s: float = 30.0
    ) -> None:
        client = asynchronous.Client(url, storage=storage, patience_s=patience_s)
        self._loop = _LoopThread()
        try:
            self._client = self._loop.run(client.__aenter__())
        except BaseException:
            self._loop.end()
            raise
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the broker; harmless when repeated."""
        atexit.unregister(self.close)
        if self._loop.alive:
            try:
                self._loop.run(self._client.__aexit__())
            finally:
                self._loop.end()

    def submit(
        self,
        request: Mapping[str, object],
        *,
        priority: int = 0,
        correlation_id: str | None = None,
        reply_to: str | None = None,
        expiration_s: float | None = None,
    ) -> str:
        """Publish one request; its task id. See ``acestep_consumer.client.Client.submit``."""
        return self._loop.run(
            self._client.submit(
                request,
                priority=priority,
                correlation_id=correlation_id,
                reply_to=reply_to,
                expiration_s=expiration_s,
            )
        )

    def outlook(self, within_s: float = 2.0) -> Outlook:
        """Say what a request that was submitted just now can expect. See ``acestep_consumer.client.Client.outlook``."""
        return self._loop.run(self._client.outlook(within_s))

    def start(
        self,
        request: Mapping[str, object],
        *,
        priority: int = 0,
        correlation_id: str | None = None,
        expiration_s: float | None = None,
    ) -> "SyncJob":
        """Publish one request and listen to its job. See ``acestep_consumer.client.Client.start``."""
        started = self._client.start(
            request, priority=priority, correlation_id=correlation_id, expiration_s=expiration_s
        )
        return SyncJob(self._loop.run(started), self._loop)

    def job(self, task_id: str) -> "SyncJob":
        """Listen to a job that somebody submitted, now or long ago."""
        return SyncJob(self._loop.run(self._client.job(task_id)), self._loop)

    def wait(self, task_id: str, timeout_s: float | None = None) -> TerminalEvent:
        """Return the terminal event of a job. Raises ``NotEndedYet``."""
        return self._loop.run(self._client.wait(task_id, timeout_s))

    def cancel(self, task_id: str) -> None:
        """Ask for a job to stop. Raises ``NoQueue`` when nobody is there to hear it."""
        self._loop.run(self._client.cancel(task_id))

    def result(self, event_or_id: TerminalEvent | str, folder: Path | str) -> tuple[Path, ...]:
        """Download a job's songs. See ``acestep_consumer.client.Client.result``."""
        return self._loop.run(self._client.result(event_or_id, folder))

    def stream(self, *routing_keys: str) -> Iterator[JobEvent | WorkerEvent]:
        """Yield events as they come, from the first step of the loop on; leaving the loop ends the subscription."""
        return self._loop.iterate(self._client.stream(*routing_keys))


class SyncJob:
    """A job that somebody listens to; see ``acestep_consumer.client.Job``."""

    def __init__(self, job: asynchronous.Job, loop: "_LoopThread") -> None:
        self._job = job
        self._loop = loop

    @property
    def task_id(self) -> str:
        """Its id."""
        return self._job.task_id

    @property
    def ended(self) -> TerminalEvent | None:
        """Its terminal event; None while it waits or runs."""
        return self._job.ended

    def events(self) -> Iterator[JobEvent]:
        """Yield what has happened and what happens, until after the terminal event."""
        return self._loop.iterate(self._job.events())

    def wait(self, timeout_s: float | None = None) -> TerminalEvent:
        """Return the terminal event. Raises ``NotEndedYet``."""
        return self._loop.run(self._job.wait(timeout_s))

    def cancel(self) -> None:
        """Ask for it to stop."""
        self._loop.run(self._job.cancel())

    def result(self, folder: Path | str, timeout_s: float | None = None) -> tuple[Path, ...]:
        """Wait for the end, then download the songs."""
        return self._loop.run(self._job.result(folder, timeout_s))


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="acestep client", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what ``work`` returns; Ctrl-C in the caller cancels it."""
        if not self.alive:
            work.close()
            raise ClientError("this client is closed: make a new one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        try:
            while (item := self.run(_next(items))) is not None:
                yield item
        finally:
            if self.alive:
                self.run(items.aclose())

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


async def _next(items: AsyncGenerator[T, None]) -> T | None:
    return await anext(items, None)


# The public names are those of the asynchronous client.
Client = SyncClient
Job = SyncJob
