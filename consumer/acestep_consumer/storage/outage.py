# SPDX-License-Identifier: Apache-2.0
"""Storage that is away is waited for: work in hand stays in hand, nothing new is taken, and it goes on by itself.

The calls to S3 try again for half a minute of their own. What is still refused then is an outage: a server that is
down, a network that is cut, keys that somebody has to renew. No job can be blamed for that, so none fails of it.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from acestep_consumer.domain.errors import ManifestUnreadable, StorageUnavailable
from acestep_consumer.domain.job import Attempt, Job, Rendering, Sources, StoredObject
from acestep_consumer.domain.outcome import TerminalRecord
from acestep_consumer.domain.ports import AttemptStore, Inputs, Store

T = TypeVar("T")

FIRST_S, LAST_S = 0.5, 15.0

log = structlog.get_logger()


class OutageGate:
    """Waits out outages.

    Args:
        on_change: told when storage is found to be away (True), and when it is back (False).
        first_s: bound of the first pause between two tries, seconds; it doubles.
        last_s: bound of every pause.
    """

    def __init__(
        self, on_change: Callable[[bool], Awaitable[None]], *, first_s: float = FIRST_S, last_s: float = LAST_S
    ) -> None:
        self._on_change = on_change
        self._wait = wait_random_exponential(multiplier=first_s, max=last_s)
        self.away = False

    async def outlast(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what ``call`` returns, as soon as storage lets it. Raises what storage has no part in."""
        tries = AsyncRetrying(
            retry=retry_if_exception(_may_pass), wait=self._wait, before_sleep=self._on_failure, reraise=True
        )

        async def attempt() -> T:
            # Not the call itself: tenacity awaits what is written as a coroutine function, and lambdas are not.
            return await call()

        result: T = await tries(attempt)
        if self.away:
            self.away = False
            await self._on_change(False)  # noqa: FBT003 - a callback's one argument
            log.info("storage is back")
        return result

    async def _on_failure(self, state: RetryCallState) -> None:
        if self.away:
            return
        self.away = True
        await self._on_change(True)  # noqa: FBT003 - as above
        error = state.outcome.exception() if state.outcome else None
        log.error("storage is away: work in hand waits, nothing new is taken", reason=str(error))


class RetryingStore:
    """A ``ports.Store`` that waits where another would fail."""

    def __init__(self, store: Store, patience: OutageGate) -> None:
        self._store = store
        self._patience = patience

    def use(self, store: Store) -> None:
        """Ask this store from the next call on."""
        self._store = store

    async def find(self, task_id: str) -> TerminalRecord | None:
        """Return how a task ended, if it did. Raises ``ManifestUnreadable``."""
        return await self._patience.outlast(lambda: self._store.find(task_id))

    async def put(self, job: Job, rendering: Rendering) -> tuple[StoredObject, ...]:
        """Upload the tracks. What is there already is not sent again."""
        return await self._patience.outlast(lambda: self._store.put(job, rendering))

    async def missing(self, record: TerminalRecord) -> bool:
        """Whether audio of a completed task is gone, or is not what its manifest says."""
        return await self._patience.outlast(lambda: self._store.missing(record))

    async def commit(self, kept: TerminalRecord, instead_of: TerminalRecord | None = None) -> TerminalRecord:
        """Write down how a task ended; return what is written. Raises ``ManifestUnreadable``."""
        return await self._patience.outlast(lambda: self._store.commit(kept, instead_of))


class RetryingAttempts:
    """``ports.AttemptStore`` that wait where others would fail."""

    def __init__(self, attempts: AttemptStore, patience: OutageGate) -> None:
        self._attempts = attempts
        self._patience = patience

    async def next(self, task_id: str, message: str, *, redelivered: bool) -> Attempt:
        """Return the try that comes next; nothing is written."""
        return await self._patience.outlast(lambda: self._attempts.next(task_id, message, redelivered=redelivered))

    async def begin(self, attempt: Attempt) -> None:
        """Write down that the try begins now."""
        await self._patience.outlast(lambda: self._attempts.begin(attempt))

    async def excuse(self, attempt: Attempt) -> None:
        """Write down that the try was ended through no fault of the message; at once or not at all."""
        await self._attempts.excuse(attempt)


class RetryingInputs:
    """``ports.Inputs`` that wait where others would fail."""

    def __init__(self, inputs: Inputs, patience: OutageGate) -> None:
        self._inputs = inputs
        self._patience = patience

    async def fetch(self, job: Job, folder: Path) -> Sources:
        """Copy the job's inputs into ``folder``. Raises ``InputNotAllowed``, ``InputUnreadable``."""
        return await self._patience.outlast(lambda: self._inputs.fetch(job, folder))


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, StorageUnavailable) and not isinstance(error, ManifestUnreadable)
