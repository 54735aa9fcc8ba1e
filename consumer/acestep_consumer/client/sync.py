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
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack

from acestep_consumer import client as asynchronous
from acestep_consumer.client.client import AnyRequest, RequestOptions
from acestep_consumer.client.errors import (
    ClientError,
    DownloadFailed,
    InvalidTaskId,
    JobCancelledError,
    JobExpiredError,
    JobFailedError,
    JobRejectedError,
    NoQueue,
    NoSongs,
    NotEndedYet,
    QueueFull,
    Unreachable,
)
from acestep_consumer.client.estimate import QueueEstimate as Outlook
from acestep_schemas.events import JobEvent, TerminalEvent, WorkerEvent
from acestep_schemas.request_body import RequestBody

if TYPE_CHECKING:
    from acestep_consumer.config.settings import StorageSettings
    from acestep_consumer.storage.lineage import Family

T = TypeVar("T")

__all__ = [
    "Client",
    "ClientError",
    "DownloadFailed",
    "InvalidTaskId",
    "Job",
    "JobCancelledError",
    "JobExpiredError",
    "JobFailedError",
    "JobRejectedError",
    "NoQueue",
    "NoSongs",
    "NotEndedYet",
    "Outlook",
    "QueueFull",
    "RequestBody",
    "Unreachable",
]


class SyncClient:
    """The same methods and arguments as ``acestep_consumer.client.Client``.

    Connects when a ``with`` block is entered, else at the first call; outside of ``with``, call ``close`` at the end.
    Threads may share it.
    """

    def __init__(
        self, url: str | None = None, *, storage: "StorageSettings | None" = None, patience_s: float = 30.0
    ) -> None:
        self._client = asynchronous.Client(url, storage=storage, patience_s=patience_s)
        self._loop = _LoopThread(self._client)

    def __enter__(self) -> Self:
        self._loop.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection for good; harmless when repeated."""
        self._loop.close()

    def submit(self, request: AnyRequest, **options: Unpack[RequestOptions]) -> str:
        """Publish one request and return its task id. See ``acestep_consumer.client.Client.submit``."""
        return self._loop.run(self._client.submit(request, **options))

    def submit_many(self, requests: Iterable[AnyRequest], **options: Unpack[RequestOptions]) -> tuple[str, ...]:
        """Publish several requests. See ``acestep_consumer.client.Client.submit_many``."""
        return self._loop.run(self._client.submit_many(requests, **options))

    def outlook(self, within_s: float = 2.0) -> Outlook:
        """Estimate place and waiting time of a request. See ``acestep_consumer.client.Client.outlook``."""
        return self._loop.run(self._client.outlook(within_s))

    def start(self, request: AnyRequest, **options: Unpack[RequestOptions]) -> "SyncJob":
        """Publish one request and follow its job. See ``acestep_consumer.client.Client.start``."""
        return SyncJob(self._loop.run(self._client.start(request, **options)), self._loop)

    def job(self, task_id: str) -> "SyncJob":
        """Follow a job that somebody submitted, now or long ago."""
        return SyncJob(self._loop.run(self._client.job(task_id)), self._loop)

    def wait(self, task_id: str, timeout_s: float | None = None) -> TerminalEvent:
        """Return the terminal event of a job. Raises ``NotEndedYet``. See ``acestep_consumer.client.Client.wait``."""
        return self._loop.run(self._client.wait(task_id, timeout_s))

    def cancel(self, task_id: str) -> None:
        """Ask for a job to stop. Raises ``NoQueue`` when the queues are not declared yet."""
        self._loop.run(self._client.cancel(task_id))

    def result(self, event_or_id: TerminalEvent | str, folder: Path | str) -> tuple[Path, ...]:
        """Download a job's songs. See ``acestep_consumer.client.Client.result``."""
        return self._loop.run(self._client.result(event_or_id, folder))

    def lineage(self, task_id: str) -> "Family":
        """Return the family of a job. See ``acestep_consumer.client.Client.lineage``."""
        return self._loop.run(self._client.lineage(task_id))

    @contextmanager
    def subscribe(self, *routing_keys: str) -> Iterator[Iterator[JobEvent | WorkerEvent]]:
        """Subscribe to events: from the beginning of the ``with`` block on, none is missed.

        Several threads may not read from one subscription. See ``acestep_consumer.client.Client.subscribe``.
        """
        subscription = self._client.subscribe(*routing_keys)
        events = self._loop.run(subscription.__aenter__())
        try:
            yield self._loop.iterate(events)
        finally:
            self._loop.run_if_open(subscription.__aexit__(None, None, None))

    def stream(self, *routing_keys: str) -> Iterator[JobEvent | WorkerEvent]:
        """Yield events, from the first step of the loop on; leaving the loop ends the subscription."""
        return self._loop.iterate_and_close(self._client.stream(*routing_keys))


class SyncJob:
    """A job and its events; see ``acestep_consumer.client.Job``."""

    def __init__(self, job: asynchronous.Job, loop: "_LoopThread") -> None:
        self._job = job
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._job)

    @property
    def task_id(self) -> str:
        """Its id."""
        return self._job.task_id

    @property
    def ended(self) -> TerminalEvent | None:
        """Its terminal event; None while it waits or runs."""
        return self._job.ended

    def events(self) -> Iterator[JobEvent]:
        """Yield the events so far and then each new one, until after the terminal event."""
        return self._loop.iterate_and_close(self._job.events())

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
    """Runs a client's coroutines in the event loop of a daemon thread, which starts with the connection."""

    def __init__(self, client: asynchronous.Client) -> None:
        self._client = client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        # Held while the thread starts or ends.
        self._changing = threading.RLock()

    def connect(self) -> asyncio.AbstractEventLoop:
        """Connect unless that is done. Raises ``ClientError``; another call tries again."""
        with self._changing:
            if self._closed:
                raise ClientError("this client is closed: make a new one")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_serve, args=(self._loop,), name="acestep client", daemon=True)
                self._thread.start()
                try:
                    _result_of(self._client.__aenter__(), self._loop)
                except BaseException:
                    self._end()
                    raise
                atexit.register(self.close)
            return self._loop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of ``work``; Ctrl-C in the caller cancels it."""
        try:
            loop = self.connect()
        except BaseException:
            work.close()
            raise
        return _result_of(work, loop)

    def run_if_open(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run it, unless the client was closed meanwhile."""
        loop = self._loop
        if loop is None:
            work.close()
        else:
            _result_of(work, loop)

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """Yield the items as they come."""
        while (item := self.run(_next(items))) is not None:
            yield item

    def iterate_and_close(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """Yield the items as they come, and close the generator when the caller leaves."""
        try:
            yield from self.iterate(items)
        finally:
            self.run_if_open(items.aclose())

    def close(self) -> None:
        """Close the client and end the thread."""
        with self._changing:
            self._closed = True
            if self._loop is None:
                return
            atexit.unregister(self.close)
            try:
                _result_of(self._client.__aexit__(), self._loop)
            finally:
                self._end()

    def _end(self) -> None:
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def _result_of(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    call = _Call(work)
    loop.call_soon_threadsafe(call.start)
    try:
        return call.result()
    except BaseException:
        loop.call_soon_threadsafe(call.cancel)
        raise


class _Call(Generic[T]):
    """A coroutine in the loop's thread, for whose result another thread waits.

    The futures of ``run_coroutine_threadsafe`` have a condition, which Ctrl-C can leave locked: the loop's thread would
    wait for it for good, and the program's for the loop. A plain lock is interrupted before or after it is acquired.
    """

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self._running = threading.Lock()
        self._running.acquire()

    def start(self) -> None:
        """Start it; in the loop's thread."""
        self._task = asyncio.get_running_loop().create_task(self._work)
        self._task.add_done_callback(self._end)

    def cancel(self) -> None:
        """Cancel it, if it runs; in the loop's thread."""
        if self._task is not None:
            self._task.cancel()

    def result(self) -> T:
        """Wait for its end, and return the result or raise its error."""
        self._running.acquire()
        if self._task is None:
            raise RuntimeError("a call ended that did not begin")
        return self._task.result()

    def _end(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # else asyncio would log one that nobody waits for any more
        self._running.release()


async def _next(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)


# The public names are those of the asynchronous client.
Client = SyncClient
Job = SyncJob
