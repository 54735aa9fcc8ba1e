# SPDX-License-Identifier: Apache-2.0
"""Sorts the events of one subscription to the jobs that they are about."""

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

# So long the broker has for bindings that are being taken back when the client leaves: an AMQP call that is cut off
# closes its channel, with a line about it in the log.
_PARTING_S: Final = 1.0

_log: Final = logging.getLogger("acestep_consumer.client")


class Dispatcher:
    """One queue for all jobs of a client: made at the first job, one binding a job, gone with the client.

    Args:
        line: the connection.
        endings: where ends of jobs are kept; None: no such place is known.
        listener: called with every event.
    """

    def __init__(
        self, line: ClientConnection, endings: Results | None, listener: Callable[[JobEvent | WorkerEvent], None]
    ) -> None:
        self._endings = endings
        # Workers' announcements are few, and say how long jobs take.
        self._subscription = Subscription(line, ("worker.#",), listener=listener, on_gap=self._on_gap)
        self._jobs: defaultdict[str, list[JobHandle]] = defaultdict(list)
        self._reading: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._binding = asyncio.Lock()
        self._looks: set[asyncio.Task[None]] = set()
        self._unbindings: set[asyncio.Task[None]] = set()

    async def follow(self, job: JobHandle) -> None:
        """Hear this job's events from the return on. Raises ``ClientError``."""
        async with self._opening:
            if self._reading is None or self._reading.done():
                await self._subscription.__aenter__()
                self._reading = asyncio.create_task(self._read(), name="acestep client inbox")
        self._jobs[job.task_id].append(job)
        try:
            async with self._binding:
                await self._subscription.add(_key(job.task_id))
        except BaseException:
            self._forget(job)
            raise

    def look(self, job: JobHandle) -> None:
        """See in storage, beside everything else, whether the job has ended: its event may have come before us."""
        if self._endings is not None and job.ended is None:
            self._do(self._look(job, self._endings), self._looks)
        else:
            job.remark("whether it ended earlier is not known: this client was not told where the results are")

    async def leave(self, job: JobHandle) -> None:
        """Do not follow the job any more."""
        if self._forget(job):
            await self._unbind(job.task_id)

    async def close(self) -> None:
        """End everything; who still waits for a job gets a ``ClientError``."""
        if self._reading is None:
            return
        unbindings = frozenset(self._unbindings)
        if unbindings:
            await asyncio.wait(unbindings, timeout=_PARTING_S)
        leftover = {self._reading, *self._looks, *unbindings}
        for task in leftover:
            task.cancel()
        await asyncio.wait(leftover)
        self._break(ClientError("the client was closed before the job ended"))
        await self._subscription.__aexit__()

    async def _read(self) -> None:
        try:
            async for event in self._subscription:
                if not isinstance(event, WorkerEvent):
                    self._sort(event)
        except ClientError as error:
            self._break(error)

    def _sort(self, event: JobEvent) -> None:
        for job in tuple(self._jobs.get(event.subject, ())):
            job.tell(event)
        if event.terminal and event.subject in self._jobs:
            del self._jobs[event.subject]
            self._do(self._unbind(event.subject), self._unbindings)

    def _on_gap(self) -> None:
        _log.warning("the broker had dropped this client's queue: events may be missing, ends are looked up in storage")
        for jobs in self._jobs.values():
            for job in jobs:
                self.look(job)

    async def _look(self, job: JobHandle, endings: Results) -> None:
        try:
            ending = await endings.find(job.task_id)
        except DownloadFailed as error:
            job.remark(f"whether it ended earlier is not known: {error}")
            _log.warning("could not look whether %s has ended: %s", job.task_id, error)
            return
        if ending is not None:
            job.found(ending)
            if job.ended is not None:
                await self.leave(job)

    async def _unbind(self, task_id: str) -> None:
        async with self._binding:
            if task_id not in self._jobs:  # somebody may follow it again by now
                await self._subscription.drop(_key(task_id))

    def _forget(self, job: JobHandle) -> bool:
        """Return whether nobody follows this task any more."""
        jobs = self._jobs.get(job.task_id, [])
        with suppress(ValueError):
            jobs.remove(job)
        if jobs or job.task_id not in self._jobs:
            return False
        del self._jobs[job.task_id]
        return True

    def _break(self, error: ClientError) -> None:
        for jobs in self._jobs.values():
            for job in jobs:
                job.fail(error)
        self._jobs.clear()

    def _do(self, errand: Coroutine[Any, Any, None], among: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(errand)
        among.add(task)
        task.add_done_callback(among.discard)


def _key(task_id: str) -> str:
    return f"job.*.{task_id}"
