# SPDX-License-Identifier: Apache-2.0
"""States of tasks: from events that this replica has received, else from the manifest in S3.

Nothing is stored: a replica that has just started answers as well as one that was there all the time. A manifest is
written before its event is published, so S3 is never behind. It is asked rarely: not while events come, once every few
seconds for an id without news, and by one caller at a time for each id.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import structlog

from acestep_consumer.client.errors import DownloadFailed
from acestep_consumer.gateway.result_folder import ResultFolder
from acestep_consumer.gateway.task_ids import accepted_at, is_given_out
from acestep_consumer.gateway.task_items import TaskView, ended_task, updated_task
from acestep_schemas.events import JobCompleted, JobEvent, TerminalEvent

KEPT_ENDED: Final = 2_000
"""Ended tasks in memory; of older ones the manifest is read again."""

KEPT_OPEN: Final = 50_000
NEWS_S: Final = 30.0
"""A task with an event, or an answer of S3, that is younger than this is not looked up."""

MISSING_S: Final = 2.0
"""How long it is remembered that an id without news has no manifest."""

LOOKUPS: Final = 16
LOOKUP_S: Final = 3.0
_MEASURED: Final = 50
_FIRST_GUESS_S: Final = 5.0

log = structlog.get_logger()


class TerminalEvents(Protocol):
    """Store of the ends of jobs: ``acestep_consumer.client.results.Results``."""

    async def find(self, task_id: str) -> TerminalEvent | None:
        """Return the terminal event of a job; None: it has not ended. Raises ``DownloadFailed``."""


@dataclass(slots=True)
class _TrackedTask:
    view: TaskView
    seen: bool = False
    """An event of it has arrived, or this replica has accepted it: it exists."""
    looked_up: float = 0.0
    waiters: set[asyncio.Event] = field(default_factory=set)


class TaskStates:
    """The states of all tasks that somebody asks for.

    Args:
        results: the manifests.
        folder: where these are, which no client reads.
    """

    def __init__(self, results: TerminalEvents, folder: ResultFolder) -> None:
        self._results = results
        self._folder = folder
        self._open: OrderedDict[str, _TrackedTask] = OrderedDict()
        self._ended: OrderedDict[str, TaskView] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[TaskView | None]] = {}
        self._free = asyncio.Semaphore(LOOKUPS)
        self._durations: list[float] = []
        self._storage_away = False
        self.counts: Counter[str] = Counter()

    @property
    def average_s(self) -> float:
        """The mean seconds of the latest jobs."""
        return sum(self._durations) / len(self._durations) if self._durations else _FIRST_GUESS_S

    @property
    def running(self) -> int:
        """Tasks that run, as far as this replica has been told."""
        return sum(task.view.stage == "running" for task in self._open.values())

    def known(self, task_id: str) -> TaskView | None:
        """Return the view of a task that is in memory and exists."""
        task = self._open.get(task_id)
        return self._ended.get(task_id) or (task.view if task is not None and task.seen else None)

    def accept(self, task_id: str) -> None:
        """Remember a task that is about to be published: its first event may come before the broker's confirm."""
        if task_id not in self._ended:
            task = self._track(task_id)
            task.seen, task.looked_up = True, time.monotonic()

    def forget(self, task_id: str) -> None:
        """Forget a task that was not accepted, unless an event says otherwise."""
        task = self._open.get(task_id)
        if task is not None and task.view.stage == "queued":
            del self._open[task_id]

    def add(self, event: JobEvent) -> None:
        """Take an event into account."""
        task_id = event.subject
        if task_id in self._ended:
            return
        task = self._track(task_id)
        task.seen, task.looked_up = True, time.monotonic()
        task.view = updated_task(task.view, event)
        if task.view.ended:
            self.counts[task.view.stage] += 1
            if isinstance(event, JobCompleted) and event.data.timings.total is not None:
                self._durations = [*self._durations[1 - _MEASURED :], event.data.timings.total]
            self._end(task.view)
        self._notify(task)

    async def find(self, task_id: str) -> TaskView | None:
        """Return the view of a task; None: there is no such task, as far as anybody can tell."""
        if (ended := self._ended.get(task_id)) is not None:
            self._ended.move_to_end(task_id)
            return ended
        task = self._open.get(task_id)
        if task is not None and task.seen:
            if time.monotonic() - task.looked_up > NEWS_S:
                self._look_up_once(task_id)  # the next one who asks gets the answer: this one need not wait
            return task.view
        if task is None or time.monotonic() - task.looked_up > MISSING_S:
            view = await asyncio.shield(self._look_up_once(task_id))
            if view is not None:
                return view
        task = self._open.get(task_id)
        if task is not None and (task.seen or is_given_out(task_id)):
            return task.view
        return self._ended.get(task_id)

    async def find_all(self, task_ids: Iterable[str]) -> dict[str, TaskView | None]:
        """Return the views of several tasks."""
        wanted = tuple(dict.fromkeys(task_ids))
        views = await asyncio.gather(*map(self.find, wanted))
        return dict(zip(wanted, views, strict=True))

    async def wait_for_news(self, task_ids: Collection[str], within_s: float) -> None:
        """Return at the next event of one of these tasks, or after ``within_s`` seconds."""
        changed = asyncio.Event()
        tasks = [self._track(task_id) for task_id in task_ids if task_id not in self._ended]
        for task in tasks:
            task.waiters.add(changed)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await changed.wait()
        finally:
            for task in tasks:
                task.waiters.discard(changed)

    def wake_all(self) -> None:
        """Let everybody go on who waits for news: the server ends."""
        for task in self._open.values():
            self._notify(task)

    def _look_up_once(self, task_id: str) -> asyncio.Task[TaskView | None]:
        """Read the manifest; those who ask at the same time share the answer."""
        running = self._lookups.get(task_id)
        if running is None:
            running = self._lookups[task_id] = asyncio.create_task(self._look_up(task_id))
            running.add_done_callback(lambda _: self._lookups.pop(task_id, None))
        return running

    async def _look_up(self, task_id: str) -> TaskView | None:
        found: TerminalEvent | None = None
        try:
            async with asyncio.timeout(LOOKUP_S), self._free:
                found = await self._results.find(task_id)
            self._note_storage(None)
        except (DownloadFailed, TimeoutError) as error:
            self._note_storage(str(error) or "it does not answer")
        if found is None:
            self._track(task_id).looked_up = time.monotonic()
            return None
        task = self._open.get(task_id)
        view = self._end(ended_task(found, task.view.created if task is not None and task.seen else None))
        if task is not None:
            self._notify(task)
        return view

    def _note_storage(self, problem: str | None) -> None:
        """Log when the storage is out of reach, and when it is back; not each look-up between."""
        if problem is not None and not self._storage_away:
            log.warning("manifests cannot be read", reason=problem)
        elif problem is None and self._storage_away:
            log.info("manifests can be read again")
        self._storage_away = problem is not None

    def _track(self, task_id: str) -> _TrackedTask:
        task = self._open.get(task_id)
        if task is None:
            created = accepted_at(task_id) or int(time.time())
            task = self._open[task_id] = _TrackedTask(TaskView(task_id=task_id, created=created))
            if len(self._open) > KEPT_OPEN:
                self._open.popitem(last=False)
        return task

    def _end(self, view: TaskView) -> TaskView:
        """Keep the view of an ended task, as clients may read it."""
        self._open.pop(view.task_id, None)
        shown = replace(view, items=tuple(map(self._folder.hide, view.items)), detail=self._folder.hide(view.detail))
        self._ended[view.task_id] = shown
        if len(self._ended) > KEPT_ENDED:
            self._ended.popitem(last=False)
        return shown

    def _notify(self, task: _TrackedTask) -> None:
        for waiter in task.waiters:
            waiter.set()
