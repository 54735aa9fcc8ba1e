# SPDX-License-Identifier: Apache-2.0
"""The latest jobs in bounded memory, the feeds of the pages that show them, and the tasks that keep both up to date."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import uuid4

from pydantic import BaseModel, ConfigDict

from acestep_consumer.client import DownloadFailed
from acestep_consumer.client.estimate import RetryAfter
from acestep_consumer.client.results import Results
from acestep_consumer.webui.job_request import JobRequest
from acestep_consumer.webui.job_view import JobView, updated, with_request
from acestep_consumer.webui.waiting import Place, WaitingPlaces, WorkerRegister, WorkersView
from acestep_schemas.events import Audio, JobCompleted, JobEvent, TerminalEvent, WorkerEvent
from acestep_schemas.request import GenerationRequest

MAX_ENDED: Final = 100
# More than any queue's limit should be: a job that waits is forgotten only to keep memory bounded.
MAX_JOBS: Final = 1000
# A running job reports progress twice a second. One that waits sends no events, and a look-up is one small request.
SILENT_S: Final = 60.0
LOOK_UP_EVERY_S: Final = 30.0
# An outage shows within seconds; it is one small question to the broker.
POLL_EVERY_S: Final = 2.0
_NEVER: Final = datetime.min.replace(tzinfo=UTC)


class QueueState(BaseModel):
    """The request queue at one moment.

    Attributes:
        broker: the broker answers.
        declared: the queue exists.
        waiting: requests that wait in it or, forwarded, in the queue of a tier; None when this login may not ask.
        workers: consumers of it; None as above.
    """

    model_config = ConfigDict(frozen=True)

    broker: bool
    declared: bool = True
    waiting: int | None = None
    workers: int | None = None


class BoardUpdate(BaseModel):
    """One update for a page: jobs that changed, ids of jobs that were forgotten.

    ``fresh``: these are all jobs, and the page starts anew. ``queue_state`` is None before the first poll. ``places``
    are those of all waiting jobs whose place is known.
    """

    model_config = ConfigDict(frozen=True)

    now: datetime
    fresh: bool
    queue_state: QueueState | None
    cards: tuple[JobView, ...]
    gone: tuple[str, ...]
    places: dict[str, Place] = {}
    workers: WorkersView = WorkersView()


class UpdateFeed:
    """Pending updates of one page. They are kept as ids: a slow page costs no memory and skips states."""

    def __init__(self, *, fresh: bool, pending: bool, changed: Iterator[str]) -> None:
        self.fresh = fresh
        self.changed = dict.fromkeys(changed)
        self.gone: dict[str, None] = {}
        self.available = asyncio.Event()
        if fresh or pending or self.changed:
            self.available.set()


class JobBoard:
    """All jobs that wait or run, and the latest that have ended, in the order in which they were first seen.

    Args:
        max_ended: ended jobs with songs that are kept, and as many without: failures drive no song out.
        max_jobs: jobs in all.
        clock: returns the time, in UTC.
    """

    def __init__(
        self,
        max_ended: int = MAX_ENDED,
        max_jobs: int = MAX_JOBS,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._max_ended = max_ended
        self._max_jobs = max_jobs
        self._clock = clock
        self._queue_state: QueueState | None = None
        self._queue_state_version = 0
        self._places = WaitingPlaces()
        self._workers = WorkerRegister(clock)
        self._times = RetryAfter()
        self._views: dict[str, JobView] = {}
        self._versions: dict[str, int] = {}
        self._version = self._forgot_version = self._number = 0
        self._feeds: set[UpdateFeed] = set()
        self._epoch = uuid4().hex[:8]

    @property
    def cursor(self) -> str:
        """Names the present state: a page that reconnects with it gets what changed since then alone."""
        return f"{self._epoch}-{self._version}"

    @property
    def viewers(self) -> int:
        """Number of connected pages."""
        return len(self._feeds)

    def get(self, task_id: str) -> JobView | None:
        """Return what is known of a job; None: unknown or forgotten."""
        return self._views.get(task_id)

    def request_of(self, task_id: str) -> JobRequest | None:
        """Return the request of a job; None: unknown or forgotten."""
        view = self._views.get(task_id)
        return None if view is None else view.job_request

    def audios_of(self, task_id: str) -> tuple[Audio, ...] | None:
        """Return the songs of a job; None: unknown or forgotten."""
        view = self._views.get(task_id)
        return None if view is None else view.audios

    def archived(self, epoch: str, numbers: Collection[int]) -> list[tuple[str, Audio]] | None:
        """Return the songs of the jobs with these numbers, with their task ids; None: numbers of another board."""
        if epoch != self._epoch:
            return None
        wanted = set(numbers)
        return [
            (view.task_id, audio) for view in self._views.values() if view.number in wanted for audio in view.audios
        ]

    def add_event(self, event: JobEvent) -> None:
        """Update the job that an event is about."""
        self._times.learn(event)
        known = self._views.get(event.subject)
        self._places.advance(event.subject, begun=known is not None and known.state != "waiting")
        view = updated(known or self._new(event.subject, event.time), event, self._clock())
        if view is not known:
            self._put(view)

    def add_request(self, task_id: str, request: GenerationRequest) -> None:
        """Show a job that is about to be submitted from the page."""
        view = self._new(task_id, self._clock()).model_copy(update={"sending": True})
        self._put(with_request(view, request))

    def add_worker(self, event: WorkerEvent) -> None:
        """Take a worker's announcement into account."""
        self._times.learn(event)
        if self._workers.add(event.data):
            self._touch_queue_state()

    def mark_sent(self, task_id: str, place: int | None) -> None:
        """Show that the broker has accepted a job; ``place``: requests that waited then, this one among them."""
        view = self._views.get(task_id)
        if view is not None and view.state == "waiting":
            if place:
                self._places.add(task_id, place)
            self._put(view.model_copy(update={"sending": False, "unsure": False}))

    def remove_request(self, task_id: str) -> None:
        """Remove a job that was not accepted; one that a worker has begun stays."""
        view = self._views.get(task_id)
        if view is not None and view.state == "waiting":
            self._forget(task_id)

    def mark_unsure(self, task_id: str) -> None:
        """Show that it is not known whether the broker accepted a job; one that a worker has begun was accepted."""
        view = self._views.get(task_id)
        if view is not None and view.state == "waiting":
            self._put(view.model_copy(update={"unsure": True, "sending": False}))

    def mark_stopping(self, task_id: str) -> None:
        """Show that the job's cancellation was requested."""
        view = self._views.get(task_id)
        if view is not None and not view.ended:
            self._put(view.model_copy(update={"stopping": True}))

    def set_queue_state(self, state: QueueState) -> None:
        """Show the state of the request queue."""
        self._places.limit(state.waiting)
        if state != self._queue_state:
            self._queue_state = state
            self._touch_queue_state()

    def _touch_queue_state(self) -> None:
        self._version += 1
        self._queue_state_version = self._version
        self.wake()

    def silent(self, seconds: float) -> tuple[JobView, ...]:
        """Return unfinished jobs without an event for so long."""
        since = self._clock() - timedelta(seconds=seconds)
        return tuple(view for view in self._views.values() if not view.ended and view.received <= since)

    @contextmanager
    def feed(self, cursor: str = "") -> Iterator[UpdateFeed]:
        """Open the feed of a page that has seen everything up to ``cursor``."""
        seen = self._version_of(cursor)
        changed = (task_id for task_id, version in self._versions.items() if version > (seen or 0))
        feed = UpdateFeed(fresh=seen is None, pending=self._queue_state_version > (seen or 0), changed=changed)
        self._feeds.add(feed)
        try:
            yield feed
        finally:
            self._feeds.discard(feed)

    def wake(self) -> None:
        """Wake every page's feed, also when no job has changed."""
        for feed in self._feeds:
            feed.available.set()

    def take(self, feed: UpdateFeed) -> BoardUpdate:
        """Return the feed's pending update and empty the feed."""
        update = BoardUpdate(
            now=self._clock(),
            fresh=feed.fresh,
            queue_state=self._queue_state,
            cards=tuple(self._views[task_id] for task_id in feed.changed if task_id in self._views),
            gone=tuple(feed.gone),
            places=self._places.shown(self._workers.loads(), self._times.job_s),
            workers=self._workers.summary(),
        )
        feed.fresh = False
        feed.changed.clear()
        feed.gone.clear()
        feed.available.clear()
        return update

    def _version_of(self, cursor: str) -> int | None:
        """Return the version that a cursor names; None when this board cannot say what changed since then."""
        epoch, _, version = cursor.partition("-")
        if epoch != self._epoch or not version.isdecimal():
            return None
        seen = int(version)
        return seen if self._forgot_version <= seen <= self._version else None

    def _new(self, task_id: str, since: datetime) -> JobView:
        self._number += 1
        return JobView(task_id=task_id, number=self._number, since=since, changed=_NEVER, received=self._clock())

    def _put(self, view: JobView) -> None:
        self._version += 1
        self._views[view.task_id] = view
        self._versions[view.task_id] = self._version
        for feed in self._feeds:
            feed.changed[view.task_id] = None
            feed.gone.pop(view.task_id, None)
            feed.available.set()
        if view.state != "waiting":
            self._places.remove(view.task_id)
        self._evict(view)

    def _evict(self, latest: JobView) -> None:
        """Forget the oldest ended job of the same kind, with songs or without, where there are too many."""
        if latest.ended:
            alike = [
                each.task_id for each in self._views.values() if each.ended and bool(each.songs) is bool(latest.songs)
            ]
            if len(alike) > self._max_ended:
                self._forget(alike[0])
        if len(self._views) > self._max_jobs:
            by_value = sorted(
                self._views.values(), key=lambda each: (not each.ended, bool(each.songs))
            )  # stable: oldest
            self._forget(by_value[0].task_id)

    def _forget(self, task_id: str) -> None:
        self._version += 1
        self._forgot_version = self._version
        del self._views[task_id], self._versions[task_id]
        self._places.remove(task_id)
        for feed in self._feeds:
            feed.changed.pop(task_id, None)
            feed.gone[task_id] = None
            # A page that does not read starts anew, so that its list of forgotten jobs does not grow.
            if len(feed.gone) > self._max_ended:
                feed.fresh = True
                feed.gone.clear()
                feed.changed = dict.fromkeys(self._views)
            feed.available.set()


async def add_events(events: AsyncIterator[JobEvent | WorkerEvent], board: JobBoard) -> None:
    """Add the events of jobs and workers as they come, until there are no more."""
    async for event in events:
        if isinstance(event, WorkerEvent):
            board.add_worker(event)
        else:
            board.add_event(event)


async def look_up_silent_jobs(board: JobBoard, results: Results) -> None:
    """Look into storage every half minute for the ends of silent jobs, whose events an outage may have cost."""
    while True:
        await asyncio.sleep(LOOK_UP_EVERY_S)
        for view in board.silent(SILENT_S):
            with suppress(DownloadFailed):  # storage may be unreachable; the next round asks again
                end = await results.find(view.task_id)
                if end is not None and _is_end_of(view, end):
                    board.add_event(end)


async def poll_queue_state(poll: Callable[[], Awaitable[QueueState]], board: JobBoard) -> None:
    """Show the state of the request queue every two seconds."""
    while True:
        board.set_queue_state(await poll())
        await asyncio.sleep(POLL_EVERY_S)


def _is_end_of(view: JobView, end: TerminalEvent) -> bool:
    """Whether an end belongs to this job: one without songs that is older belongs to an earlier job of the same id."""
    return isinstance(end, JobCompleted) or end.time >= view.since
