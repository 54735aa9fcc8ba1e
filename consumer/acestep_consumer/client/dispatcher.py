# SPDX-License-Identifier: Apache-2.0
"""Dispatches the events of one subscription to the handles of their jobs."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from acestep_consumer.client.connection import ClientConnection
from acestep_consumer.client.errors import ClientError, DownloadFailed
from acestep_consumer.client.job import JobHandle
from acestep_consumer.client.results import Results
from acestep_consumer.client.subscription import Subscription
from acestep_schemas.events import JobEvent, WorkerEvent

# The broker's time for bindings that are being removed when the client leaves: an AMQP call that is cut off closes its
# channel, with a line about it in the log.
_UNBIND_TIMEOUT_S: Final = 1.0

_log: Final = logging.getLogger("acestep_consumer.client")


class Dispatcher:
    """One queue for all jobs of a client: declared at the first job, one binding a job, deleted with the client.

    Args:
        connection: the connection to the broker.
        results: where ends of jobs are stored; None: unknown.
        listener: called with every event.
    """

    def __init__(
        self,
        connection: ClientConnection,
        results: Results | None,
        listener: Callable[[JobEvent | WorkerEvent], None],
    ) -> None:
        self._results = results
        # Workers' announcements are few, and say how long jobs take.
        self._subscription = Subscription(connection, ("worker.#",), listener=listener, on_gap=self._on_gap)
        self._jobs: defaultdict[str, list[JobHandle]] = defaultdict(list)
        self._reading: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._binding = asyncio.Lock()
        self._lookups: set[asyncio.Task[None]] = set()
        self._unbindings: set[asyncio.Task[None]] = set()

    async def follow(self, job: JobHandle) -> None:
        """Deliver this job's events to its handle from the return on. Raises ``ClientError``."""
        async with self._opening:
            if self._reading is None or self._reading.done():
                await self._subscription.__aenter__()
                self._reading = asyncio.create_task(self._read(), name="acestep client dispatcher")
        self._jobs[job.task_id].append(job)
        try:
            async with self._binding:
                await self._subscription.bind(_key(job.task_id))
        except BaseException:
            self._remove(job)
            raise

    def look_up(self, job: JobHandle) -> None:
        """Look into storage, in the background, whether the job ended before its events were followed."""
        if self._results is not None and job.ended is None:
            self._start(self._look_up(job, self._results), self._lookups)
        else:
            job.note("whether it ended earlier is not known: this client does not know where results are stored")

    async def unfollow(self, job: JobHandle) -> None:
        """Stop delivering the job's events to this handle."""
        if self._remove(job):
            await self._unbind(job.task_id)

    async def close(self) -> None:
        """End everything; whoever still waits for a job gets a ``ClientError``."""
        if self._reading is None:
            return
        unbindings = frozenset(self._unbindings)
        if unbindings:
            await asyncio.wait(unbindings, timeout=_UNBIND_TIMEOUT_S)
        leftover = {self._reading, *self._lookups, *unbindings}
        for task in leftover:
            task.cancel()
        await asyncio.wait(leftover)
        self._fail_all(ClientError("the client was closed before the job ended"))
        await self._subscription.__aexit__()

    async def _read(self) -> None:
        try:
            async for event in self._subscription:
                if not isinstance(event, WorkerEvent):
                    self._dispatch(event)
        except ClientError as error:
            self._fail_all(error)
        except Exception as error:
            # Whoever waits for a job would wait for good.
            self._fail_all(ClientError(f"events can no longer be read: {type(error).__name__}: {error}"))
            raise

    def _dispatch(self, event: JobEvent) -> None:
        for job in tuple(self._jobs.get(event.subject, ())):
            job.add(event)
        if event.terminal and event.subject in self._jobs:
            del self._jobs[event.subject]
            self._start(self._unbind(event.subject), self._unbindings)

    def _on_gap(self) -> None:
        _log.warning("the broker had deleted this client's queue: events may be missing; looking into storage for ends")
        for jobs in self._jobs.values():
            for job in jobs:
                self.look_up(job)

    async def _look_up(self, job: JobHandle, results: Results) -> None:
        try:
            end = await results.find(job.task_id)
        except DownloadFailed as error:
            job.note(f"whether it ended earlier is not known: {error}")
            _log.warning("could not look up whether %s has ended: %s", job.task_id, error)
            return
        if end is not None:
            job.add_stored(end)
            if job.ended is not None:
                await self.unfollow(job)

    async def _unbind(self, task_id: str) -> None:
        async with self._binding:
            if task_id not in self._jobs:  # it may be followed again by now
                await self._subscription.unbind(_key(task_id))

    def _remove(self, job: JobHandle) -> bool:
        """Remove the handle. Returns whether it was the last one of its task."""
        jobs = self._jobs.get(job.task_id, [])
        with suppress(ValueError):
            jobs.remove(job)
        if jobs or job.task_id not in self._jobs:
            return False
        del self._jobs[job.task_id]
        return True

    def _fail_all(self, error: ClientError) -> None:
        for jobs in self._jobs.values():
            for job in jobs:
                job.fail(error)
        self._jobs.clear()

    def _start(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _key(task_id: str) -> str:
    return f"job.*.{task_id}"
