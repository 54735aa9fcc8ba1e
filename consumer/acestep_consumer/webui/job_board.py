# SPDX-License-Identifier: Apache-2.0
"""The last jobs, in bounded memory, and the pages that look at them."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import uuid4

from pydantic import BaseModel, ConfigDict

from acestep_consumer.webui.job_view import JobView, request_shown, told
from acestep_schemas.events import JobEvent
from acestep_schemas.request import GenerationRequest


class QueueState(BaseModel):
    """The request queue at one moment.

    Attributes:
        broker: it answers.
        declared: the queue is there.
        waiting: requests that no worker has in hand, in it or, sent on, in the queue of a tier; None when this login
            may not look.
        workers: how many take requests from it; None as above.
    """

    model_config = ConfigDict(frozen=True)

    broker: bool
    declared: bool = True
    waiting: int | None = None
    workers: int | None = None


KEPT: Final = 100
# More than any queue's limit should be: a job that waits is forgotten only to keep memory bounded.
MOST: Final = 1000
_NOBODY: Final = datetime.min.replace(tzinfo=UTC)


class BoardUpdate(BaseModel):
    """What a page is sent: cards that changed, ids of jobs that are forgotten; ``fresh``: these are all there are.

    ``pulse`` is None before the broker was first looked at.
    """

    model_config = ConfigDict(frozen=True)

    now: datetime
    fresh: bool
    pulse: QueueState | None
    cards: tuple[JobView, ...]
    gone: tuple[str, ...]


class UpdateFeed:
    """News for one page. What it has not taken yet is kept as ids: a slow page costs no memory and skips states."""

    def __init__(self, *, fresh: bool, stale: bool, changed: Iterator[str]) -> None:
        self.fresh = fresh
        self.changed = dict.fromkeys(changed)
        self.gone: dict[str, None] = {}
        self.news = asyncio.Event()
        if fresh or stale or self.changed:
            self.news.set()


class JobBoard:
    """Jobs in the order in which they came up: all that are waiting or running, and the last that have ended.

    Args:
        kept: jobs that have ended and are remembered.
        most: jobs in all.
        clock: tells the time, in UTC.
    """

    def __init__(
        self, kept: int = KEPT, most: int = MOST, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._kept = kept
        self._most = most
        self._clock = clock
        self._pulse: QueueState | None = None
        self._felt_in = 0
        self._cards: dict[str, JobView] = {}
        self._changed_in: dict[str, int] = {}
        self._version = self._forgot_in = self._number = 0
        self._feeds: set[UpdateFeed] = set()
        self._epoch = uuid4().hex[:8]

    @property
    def mark(self) -> str:
        """Names this moment: a page that comes back with it gets what changed since, and not everything."""
        return f"{self._epoch}-{self._version}"

    @property
    def watched(self) -> int:
        """How many pages look."""
        return len(self._feeds)

    def card(self, task_id: str) -> JobView | None:
        """Return what is known of a job; None for one that was never heard of, or is forgotten."""
        return self._cards.get(task_id)

    def hear(self, event: JobEvent) -> None:
        """Take in an event."""
        known = self._cards.get(event.subject)
        card = told(known or self._new(event.subject, event.time), event, self._clock())
        if card is not known:
            self._put(card)

    def order(self, task_id: str, request: GenerationRequest) -> None:
        """Put up a job that is about to be submitted from here."""
        self._put(self._new(task_id, self._clock()).model_copy(update={"request": request_shown(request)}))

    def withdraw(self, task_id: str) -> None:
        """Take down a job that was not accepted; one that a worker has begun stays."""
        card = self._cards.get(task_id)
        if card is not None and card.state == "waiting":
            self._forget(task_id)

    def doubt(self, task_id: str) -> None:
        """Show that nobody knows whether the broker took a job; one that a worker has begun was taken."""
        card = self._cards.get(task_id)
        if card is not None and card.state == "waiting":
            self._put(card.model_copy(update={"unsure": True}))

    def feel(self, pulse: QueueState) -> None:
        """Take in how broker and workers are."""
        if pulse == self._pulse:
            return
        self._pulse = pulse
        self._version += 1
        self._felt_in = self._version
        self.wake()

    def stop(self, task_id: str) -> None:
        """Show that somebody asked for the job to stop."""
        card = self._cards.get(task_id)
        if card is not None and not card.ended:
            self._put(card.model_copy(update={"stopping": True}))

    def silent(self, seconds: float) -> tuple[JobView, ...]:
        """Return unfinished jobs of which nothing was heard for so long."""
        since = self._clock() - timedelta(seconds=seconds)
        return tuple(card for card in self._cards.values() if not card.ended and card.heard <= since)

    @contextmanager
    def feed(self, mark: str = "") -> Iterator[UpdateFeed]:
        """Open news for a page that has seen everything up to ``mark``."""
        seen = self._read(mark)
        changed = (task_id for task_id, version in self._changed_in.items() if version > (seen or 0))
        feed = UpdateFeed(fresh=seen is None, stale=self._felt_in > (seen or 0), changed=changed)
        self._feeds.add(feed)
        try:
            yield feed
        finally:
            self._feeds.discard(feed)

    def wake(self) -> None:
        """Let every page's news come through, also when no card has changed."""
        for feed in self._feeds:
            feed.news.set()

    def take(self, feed: UpdateFeed) -> BoardUpdate:
        """Return what the page has not seen yet; it counts as seen."""
        cards = tuple(self._cards[task_id] for task_id in feed.changed if task_id in self._cards)
        batch = BoardUpdate(now=self._clock(), fresh=feed.fresh, pulse=self._pulse, cards=cards, gone=tuple(feed.gone))
        feed.fresh = False
        feed.changed.clear()
        feed.gone.clear()
        feed.news.clear()
        return batch

    def _read(self, mark: str) -> int | None:
        """The version that a mark means; None when this board cannot say what changed since."""
        epoch, _, version = mark.partition("-")
        if epoch != self._epoch or not version.isdecimal():
            return None
        seen = int(version)
        return seen if self._forgot_in <= seen <= self._version else None

    def _new(self, task_id: str, since: datetime) -> JobView:
        self._number += 1
        return JobView(task_id=task_id, number=self._number, since=since, changed=_NOBODY, heard=self._clock())

    def _put(self, card: JobView) -> None:
        self._version += 1
        self._cards[card.task_id] = card
        self._changed_in[card.task_id] = self._version
        for feed in self._feeds:
            feed.changed[card.task_id] = None
            feed.gone.pop(card.task_id, None)
            feed.news.set()
        ended = [task_id for task_id, card in self._cards.items() if card.ended]
        if len(ended) > self._kept:
            self._forget(ended[0])
        elif len(self._cards) > self._most:
            self._forget(next(iter((*ended, *self._cards))))

    def _forget(self, task_id: str) -> None:
        self._version += 1
        self._forgot_in = self._version
        del self._cards[task_id], self._changed_in[task_id]
        for feed in self._feeds:
            feed.changed.pop(task_id, None)
            feed.gone[task_id] = None
            # A page that is away for long: it starts anew rather than that its list of the gone grows.
            if len(feed.gone) > self._kept:
                feed.fresh = True
                feed.gone.clear()
                feed.changed = dict.fromkeys(self._cards)
            feed.news.set()
