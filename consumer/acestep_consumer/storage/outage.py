# SPDX-License-Identifier: Apache-2.0
"""Outages of the storage: running jobs wait, no new messages are consumed, and both resume without intervention.

Calls to the storage have retries of their own, for some seconds. A failure that outlasts them is an outage: a server
that is down, a network that is cut, keys that somebody has to renew. None of that is a job's fault, so no job fails.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from acestep_consumer.domain.errors import ManifestUnreadable, StorageUnavailable
from acestep_consumer.domain.job import Attempt, Job, Rendering, Sources, StoredObject
from acestep_consumer.domain.outcome import TerminalRecord
from acestep_consumer.domain.ports import AttemptStore, Inputs, Store
from acestep_consumer.storage.retry import failed_once

T = TypeVar("T")

FIRST_S, LAST_S = 0.5, 15.0

ONE_OBJECT_S = 600.0
"""Seconds that a call may fail over one object while the storage answers otherwise."""

WATCH_S = 5.0
"""Seconds between two questions to the storage, while nothing else may call it."""

log = structlog.get_logger()


class OutageGate:
    """Retries calls for as long as an outage lasts.

    Args:
        on_change: called with True when an outage begins, and with False when it ends.
        ready: asks the storage whether it answers at all. Raises if not.
        first_s: bound of the first pause between two attempts, seconds; it doubles.
        last_s: bound of every pause.
        one_object_s: seconds that a read may fail while the storage answers otherwise.
    """

    def __init__(
        self,
        on_change: Callable[[bool], Awaitable[None]],
        ready: Callable[[], Awaitable[None]],
        *,
        first_s: float = FIRST_S,
        last_s: float = LAST_S,
        one_object_s: float = ONE_OBJECT_S,
    ) -> None:
        self._on_change = on_change
        self._ready = ready
        self._one_object_s = one_object_s
        self._wait = wait_random_exponential(multiplier=first_s, max=last_s)
        self._failing = 0
        self.away = False

    async def retry(self, call: Callable[[], Awaitable[T]], *, reads: bool = False) -> T:
        """Return the result of ``call`` as soon as the storage allows it. Raises its errors of any other cause.

        The outage ends when a call that had failed gets through, or when none is left that fails. One that never failed
        proves nothing: storage that is full still answers reads. A call that ``reads`` may fail over a damaged object:
        while the storage answers otherwise that is no outage, and after ``one_object_s`` the error is raised.
        """
        try:
            return await call()
        except StorageUnavailable as error:
            if not _is_outage(error):
                raise
            again = failed_once(error, call)
        failed = done = False
        damaged_since: float | None = None

        async def on_failure(state: RetryCallState) -> None:
            nonlocal failed, damaged_since
            if reads and not failed and await self._answers():
                damaged_since = damaged_since or time.monotonic()
                log.warning("an object cannot be read", reason=_reason(state))
                return
            damaged_since = None
            self._failing += not failed
            failed = True
            await self._begin(state)

        def is_damaged(_: RetryCallState) -> bool:
            return damaged_since is not None and time.monotonic() > damaged_since + self._one_object_s

        retrying = AsyncRetrying(
            retry=retry_if_exception(_is_outage),
            wait=self._wait,
            stop=is_damaged,
            before_sleep=on_failure,
            reraise=True,
        )
        try:
            result: T = await retrying(again)
            done = True
        finally:
            self._failing -= failed
            if failed and (done or not self._failing):
                await self._end()
        return result

    async def _answers(self) -> bool:
        try:
            await self._ready()
        except Exception:  # noqa: BLE001 - whatever it is, the storage does not answer as it should
            return False
        return True

    async def _begin(self, state: RetryCallState) -> None:
        if self.away:
            return
        self.away = True
        await self._on_change(True)  # noqa: FBT003 - a callback's one argument
        log.error("storage is unavailable: running jobs wait, no new jobs", reason=_reason(state))

    async def _end(self) -> None:
        if not self.away:
            return
        self.away = False
        await self._on_change(False)  # noqa: FBT003 - as above
        log.info("storage is available again")


async def watch(gate: OutageGate, ready: Callable[[], Awaitable[None]], every_s: float = WATCH_S) -> None:
    """Ask the storage again and again, until cancelled: an outage is known, and its end, while no job calls it."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await gate.retry(ready)
        except Exception:
            log.exception("storage could not be asked")


class RetryingStore:
    """A ``ports.Store`` behind an ``OutageGate``."""

    def __init__(self, store: Store, gate: OutageGate) -> None:
        self._store = store
        self._gate = gate

    def use(self, store: Store) -> None:
        """Use this store from the next call on."""
        self._store = store

    async def find(self, task_id: str) -> TerminalRecord | None:
        """Return how a task ended, if it did. Raises ``ManifestUnreadable``."""
        return await self._gate.retry(lambda: self._store.find(task_id), reads=True)

    async def put(self, job: Job, rendering: Rendering) -> tuple[StoredObject, ...]:
        """Upload the tracks. Those that were stored before are not sent again."""
        return await self._gate.retry(lambda: self._store.put(job, rendering))

    async def missing(self, record: TerminalRecord) -> bool:
        """Whether audio of a completed task is gone, or is not what its manifest says."""
        return await self._gate.retry(lambda: self._store.missing(record), reads=True)

    async def commit(self, record: TerminalRecord, instead_of: TerminalRecord | None = None) -> TerminalRecord:
        """Write a task's terminal record; return the one in force. Raises ``ManifestUnreadable``."""
        return await self._gate.retry(lambda: self._store.commit(record, instead_of))


class RetryingAttempts:
    """A ``ports.AttemptStore`` behind an ``OutageGate``."""

    def __init__(self, attempts: AttemptStore, gate: OutageGate) -> None:
        self._attempts = attempts
        self._gate = gate

    async def next(self, task_id: str, message: str, *, redelivered: bool) -> Attempt:
        """Return the attempt that comes next; nothing is written."""
        next_attempt = partial(self._attempts.next, task_id, message, redelivered=redelivered)
        return await self._gate.retry(next_attempt, reads=True)

    async def begin(self, attempt: Attempt, *, expires: bool) -> None:
        """Record that the attempt begins now."""
        await self._gate.retry(lambda: self._attempts.begin(attempt, expires=expires))

    async def renew(self, attempt: Attempt, count: int) -> None:
        """Record that the attempt goes on; without retries."""
        await self._attempts.renew(attempt, count)

    async def excuse(self, attempt: Attempt) -> None:
        """Record that the attempt ended through no fault of the message; without retries."""
        await self._attempts.excuse(attempt)

    async def unfinished(self, task_id: str, message: str, *, delivered: bool) -> tuple[bytes, ...]:
        """Return the records of attempts that may go on."""
        unfinished = partial(self._attempts.unfinished, task_id, message, delivered=delivered)
        return await self._gate.retry(unfinished, reads=True)

    async def forget(self, task_id: str, message: str) -> None:
        """Remove the records of a message that has ended; without retries."""
        await self._attempts.forget(task_id, message)


class RetryingInputs:
    """``ports.Inputs`` behind an ``OutageGate``."""

    def __init__(self, inputs: Inputs, gate: OutageGate) -> None:
        self._inputs = inputs
        self._gate = gate

    async def fetch(self, job: Job, folder: Path) -> Sources:
        """Copy the job's inputs into ``folder``. Raises ``InputNotAllowed``, ``InputUnreadable``."""
        return await self._gate.retry(lambda: self._inputs.fetch(job, folder), reads=True)


def _reason(state: RetryCallState) -> str:
    return str(state.outcome.exception() if state.outcome else None)


def _is_outage(error: BaseException) -> bool:
    return isinstance(error, StorageUnavailable) and not isinstance(error, ManifestUnreadable)
