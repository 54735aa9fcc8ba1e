# SPDX-License-Identifier: Apache-2.0
"""One job as its producer sees it: what it does, how it ends, its songs."""

import asyncio
from collections.abc import AsyncGenerator
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol

from acestep_consumer.client.errors import ClientError, NotEndedYet
from acestep_schemas.events import Completed, JobEvent, JobProgress, TerminalEvent

# Clocks of two machines differ; an end that is older than this before the request belongs to an earlier try.
_SKEW_S: Final = 5.0


class JobChannel(Protocol):
    """What a job needs from its client."""

    async def cancel(self, task_id: str) -> None:
        """Ask for a job to stop."""

    async def result(self, event_or_id: TerminalEvent | str, folder: Path | str) -> tuple[Path, ...]:
        """Download the songs of a job."""


class JobHandle:
    """A job that somebody listens to. Made by ``Client.start`` and ``Client.job``.

    Attributes:
        task_id: its id.
        ended: its terminal event; None while it waits or runs.
    """

    def __init__(self, task_id: str, office: JobChannel, *, since: datetime | None = None) -> None:
        self.task_id = task_id
        self.ended: TerminalEvent | None = None
        self._office = office
        self._since = since
        self._told: list[tuple[int, JobEvent]] = []
        self._count = 0
        self._broken: ClientError | None = None
        self._note = ""
        self._news = asyncio.Event()

    async def events(self) -> AsyncGenerator[JobEvent, None]:
        """Yield what has happened and what happens, until after the terminal event.

        Of progress that was reported while nobody read, only the latest is kept. May be iterated more than once.

        Raises:
            ClientError: the broker does not let this client listen any more.
        """
        seen = 0
        while True:
            for number, event in tuple(self._told):
                if number > seen:
                    seen = number
                    yield event
            if self.ended is not None and seen == self._count:
                return
            if self._broken is not None:
                raise self._broken
            if seen == self._count:
                await self._news.wait()

    async def wait(self, timeout_s: float | None = None) -> TerminalEvent:
        """Return the terminal event, whether it has come already or is still to come.

        Args:
            timeout_s: seconds to wait; None: for ever.

        Raises:
            NotEndedYet: the job goes on; wait again, or cancel it.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self.ended is None and self._broken is None:
                    await self._news.wait()
        except TimeoutError:
            raise NotEndedYet(f"{self.task_id} has not ended in {timeout_s:g} s: {self._state()}") from None
        if self.ended is None:
            assert self._broken is not None  # noqa: S101 - for the type checker: the loop ended
            raise self._broken
        return self.ended

    async def cancel(self) -> None:
        """Ask for it to stop. It ends as ``cancelled``, unless it was done first."""
        await self._office.cancel(self.task_id)

    async def result(self, folder: Path | str, timeout_s: float | None = None) -> tuple[Path, ...]:
        """Wait for the end, then download the songs; see ``Client.result``."""
        return await self._office.result(await self.wait(timeout_s), folder)

    def tell(self, event: JobEvent) -> None:
        """Take in an event; what comes after the terminal one is late and ignored."""
        if self.ended is not None:
            return
        if isinstance(event, JobProgress):
            self._told = [item for item in self._told if not isinstance(item[1], JobProgress)]
        self._count += 1
        self._told.append((self._count, event))
        if isinstance(event, TerminalEvent):
            self.ended = event
        self._wake()

    def found(self, ending: TerminalEvent) -> None:
        """Take in an end that was found in storage, unless it is that of an earlier try under the same id."""
        new = self._since is None or (ending.data.finished_at - self._since).total_seconds() > -_SKEW_S
        if new or isinstance(ending.data, Completed):
            self.tell(ending)

    def fail(self, error: ClientError) -> None:
        """Tell everyone who waits that nothing more will be heard."""
        self._broken = error
        self._wake()

    def remark(self, note: str) -> None:
        """Keep ``note`` for the error of a wait that is over too soon."""
        self._note = note

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _state(self) -> str:
        last = self._told[-1][1] if self._told else None
        if isinstance(last, JobProgress):
            text = f"{last.data.stage}, {last.data.progress:.0%}"
        else:
            text = "started" if last else "nothing heard of it; it waits in the queue, or the id is wrong"
        return f"{text}; {self._note}" if self._note else text
