# SPDX-License-Identifier: Apache-2.0
"""The handle of one job: its events, its end, its songs."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol

from acestep_consumer.client.errors import ClientError, NotEndedYet
from acestep_schemas.events import Completed, JobEvent, JobProgress, TerminalEvent

# Clocks of two machines differ; an end that is older than this before the request belongs to an earlier try.
_SKEW_S: Final = 5.0
# A wait without a limit for somebody else's job asks so often whether such a job can exist, while no event of it comes.
ASK_EVERY_S: Final = 30.0
# It gives up when so many answers in a row say no. A request that waits in the queue of a tier without workers is not
# seen, but within that time a worker of another tier takes it.
IDLE_ANSWERS: Final = 3

_log: Final = logging.getLogger("acestep_consumer.client")


class JobChannel(Protocol):
    """The client's methods that a job's handle calls."""

    async def cancel(self, task_id: str) -> None:
        """Ask for a job to stop."""

    async def result(self, event_or_id: TerminalEvent | str, folder: Path | str) -> tuple[Path, ...]:
        """Download the songs of a job."""

    async def is_idle(self) -> bool:
        """Whether no request waits and no job runs."""


class JobHandle:
    """A job and its events. Made by ``Client.start`` and ``Client.job``.

    Attributes:
        task_id: the job's id.
        ended: its terminal event; None while it waits or runs.
    """

    def __init__(self, task_id: str, channel: JobChannel, *, since: datetime | None = None) -> None:
        self.task_id = task_id
        self.ended: TerminalEvent | None = None
        self._channel = channel
        # When this client submitted it; None: somebody else did, if anybody.
        self._since = since
        # Numbered in the order in which they came.
        self._events: list[tuple[int, JobEvent]] = []
        self._count = 0
        self._error: ClientError | None = None
        self._note = ""
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Job {self.task_id}: {self._state()}>"

    async def events(self) -> AsyncGenerator[JobEvent, None]:
        """Yield the events so far and then each new one, until after the terminal event.

        Of progress that was reported while nobody read, only the latest is kept. May be iterated more than once.

        Raises:
            ClientError: the broker ended this client's subscription for good.
        """
        seen = 0
        while True:
            for number, event in tuple(self._events):
                if number > seen:
                    seen = number
                    yield event
            if self.ended is not None and seen == self._count:
                return
            if self._error is not None:
                raise self._error
            if seen == self._count:
                await self._news.wait()

    async def wait(self, timeout_s: float | None = None) -> TerminalEvent:
        """Return the terminal event, whether it has come already or is still to come.

        Args:
            timeout_s: seconds to wait. None: without a limit; but for a job that this client did not submit, only as
                long as it can exist: no event of it came, and three times in a row, half a minute apart, no request
                waits and no worker runs a job.

        Raises:
            NotEndedYet: the job goes on, and may be waited for again or cancelled; or no such job is known.
        """
        if timeout_s is None and self._since is None:
            await self._wait_for_an_event()
        try:
            async with asyncio.timeout(timeout_s):
                while (ended := self.ended) is None and self._error is None:
                    await self._news.wait()
        except TimeoutError:
            raise NotEndedYet(f"{self.task_id} has not ended in {timeout_s:g} s: {self._state()}") from None
        if ended is None:
            raise self._error or ClientError(f"{self.task_id}: neither ended nor failed")
        return ended

    async def cancel(self) -> None:
        """Ask for it to stop. It ends as ``cancelled``, unless it ends otherwise first."""
        await self._channel.cancel(self.task_id)

    async def result(self, folder: Path | str, timeout_s: float | None = None) -> tuple[Path, ...]:
        """Wait for the end, then download the songs; see ``Client.result``."""
        return await self._channel.result(await self.wait(timeout_s), folder)

    def add(self, event: JobEvent) -> None:
        """Take in an event; one after the terminal event is late and ignored."""
        if self.ended is not None:
            return
        if isinstance(event, JobProgress):
            self._events = [item for item in self._events if not isinstance(item[1], JobProgress)]
        self._count += 1
        self._events.append((self._count, event))
        if isinstance(event, TerminalEvent):
            self.ended = event
        self._wake()

    def add_stored(self, end: TerminalEvent) -> None:
        """Take in an end that was found in storage, unless it is that of an earlier try under the same id."""
        new = self._since is None or (end.data.finished_at - self._since).total_seconds() > -_SKEW_S
        if new or isinstance(end.data, Completed):
            self.add(end)

    def fail(self, error: ClientError) -> None:
        """Raise ``error`` for everyone who waits, since no more events will come."""
        self._error = error
        self._wake()

    def note(self, text: str) -> None:
        """Keep ``text`` for the error of a wait that is over too soon."""
        self._note = text

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _wait_for_an_event(self) -> None:
        """Return at the first event. Raises ``NotEndedYet`` when no job of this id can exist."""
        idle, warned = 0, False
        while not self._events and self._error is None:
            try:
                async with asyncio.timeout(ASK_EVERY_S):
                    await self._news.wait()
            except TimeoutError:
                idle = idle + 1 if await self._channel.is_idle() else 0
                if idle == IDLE_ANSWERS:
                    why = f"no event of it, no request waits and no job runs{self._suffix()}"
                    raise NotEndedYet(f"no job {self.task_id} is known: {why}") from None
                if not warned:
                    _log.warning("%s: %s", self.task_id, self._state())
                warned = True

    def _state(self) -> str:
        if self.ended is not None:
            return self.ended.state
        last = self._events[-1][1] if self._events else None
        if isinstance(last, JobProgress):
            text = f"{last.data.stage}, {last.data.progress:.0%}"
        elif last is not None:
            text = "started"
        else:
            text = "no event yet: still queued" + ("" if self._since else ", or an unknown id")
        return text + self._suffix()

    def _suffix(self) -> str:
        return f"; {self._note}" if self._note else ""
