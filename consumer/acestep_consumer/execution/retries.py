# SPDX-License-Identifier: Apache-2.0
"""Attempts of messages, counted across workers and bounded; the last one runs alone.

When a worker dies, all its messages are redelivered, and one of them may be the cause (a poison message). Most often
none is. So they run together again, until one has a single attempt left: that one runs with no other job beside it.

A worker may also have lost the broker alone, and go on. Whoever is about to say that its message expired waits for the
end of that attempt, or until nothing is heard of it any more.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import structlog

from acestep_consumer.concurrency.locks import SharedLock
from acestep_consumer.domain.errors import Interrupted, StorageUnavailable, WorkerLost
from acestep_consumer.domain.job import Attempt
from acestep_consumer.domain.ports import AttemptStore, Delivery

RENEW_S = 5.0
"""Seconds between two renewals of an attempt whose message was taken back."""

LOOK_S = 1.5
"""Seconds between two looks at the attempts of others."""

EXCUSE_S = 3.0
"""How long a cancelled attempt waits for storage to record that it does not count, before its worker leaves."""

SILENT_LOOKS = 30
"""Looks that show no change before an attempt counts as dead: 45 s. A worker notices a silent connection 33 s after its
last sign, and the broker after 20 s."""

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _RunningAttempt:
    delivery: Delivery
    over: asyncio.Event = field(default_factory=asyncio.Event)
    renewing: asyncio.Task[None] | None = None


class RetryPolicy:
    """Counts the attempts that this worker makes.

    Args:
        attempts: stores them.
        most: attempts that may end without an explanation, such as a killed worker.
    """

    def __init__(self, attempts: AttemptStore, most: int) -> None:
        self._attempts = attempts
        self._most = most
        self._running_jobs = SharedLock()
        self._running: dict[Attempt, _RunningAttempt] = {}

    @asynccontextmanager
    async def attempt(self, task_id: str, delivery: Delivery) -> AsyncIterator[Attempt]:
        """Make the body the next attempt at a message. Raises ``WorkerLost`` when none is left."""
        message = delivery.fingerprint
        attempt = await self._attempts.next(task_id, message, redelivered=delivery.redelivered)
        if attempt.unexplained >= self._most:
            raise WorkerLost(attempt.unexplained, attempt.number - 1)
        async with self._lock_for(attempt):
            await self._attempts.begin(attempt, expires=delivery.expires)
            running = self._running[attempt] = _RunningAttempt(delivery)
            try:
                await self.excuse_lost()  # it may have been lost before it began
                yield attempt
            except BaseException as error:
                await self._end(running)
                if delivery.stale or isinstance(error, (asyncio.CancelledError, Interrupted)):
                    # One that is lost has another worker waiting for its end, and a last one would fail its message.
                    hurries = isinstance(error, asyncio.CancelledError) and not delivery.stale
                    await self._excuse(attempt, EXCUSE_S if hurries and self.remaining(attempt) > 1 else None)
                raise
            finally:
                self._running.pop(attempt, None)
                await self._end(running)  # without a word where it has songs: their manifest is next

    def remaining(self, attempt: Attempt) -> int:
        """Return the attempts that a message has left, the present one included."""
        return self._most - attempt.unexplained

    async def forget(self, task_id: str, message: str) -> None:
        """Remove the records of a message that has ended."""
        with suppress(StorageUnavailable):  # they are small, and harmless
            await self._attempts.forget(task_id, message)

    async def excuse_lost(self) -> None:
        """Excuse the attempts whose deliveries are stale: this worker lives, only its connection died.

        The record is renewed until the attempt ends.
        """
        for attempt, running in self._running.items():
            if running.delivery.stale and running.renewing is None:
                running.renewing = asyncio.create_task(self._renew(attempt, running), name="attempt renewals")

    async def others_over(
        self, task_id: str, message: str, *, delivered: bool, ended: Callable[[], Awaitable[bool]]
    ) -> bool:
        """Wait until no worker is at the message any more, or it has ended. Returns whether any was.

        Args:
            task_id: its task.
            message: its fingerprint.
            delivered: a worker has had it for certain.
            ended: whether there is an end of it.
        """
        look = partial(self._attempts.unfinished, task_id, message, delivered=delivered)
        seen, silent = await look(), 0
        if not seen:
            return False
        log.info("waiting for another worker's attempt", task_id=task_id)
        # Looks are counted, and not seconds: in an outage of storage nobody can renew anything.
        while seen and silent < SILENT_LOOKS and not await ended():
            await asyncio.sleep(LOOK_S)
            before, seen = seen, await look()
            silent = silent + 1 if seen == before else 0
        return True

    def _lock_for(self, attempt: Attempt) -> AbstractAsyncContextManager[None]:
        alone = attempt.unexplained > 0 and self.remaining(attempt) == 1
        return self._running_jobs.alone() if alone else self._running_jobs.shared()

    async def _renew(self, attempt: Attempt, running: _RunningAttempt) -> None:
        count = 0
        while count == 0 or not running.over.is_set():
            count += 1
            with suppress(StorageUnavailable):
                await self._attempts.renew(attempt, count)
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await running.over.wait()

    async def _end(self, running: _RunningAttempt) -> None:
        """Let the last renewal end: a later one would look like an attempt that goes on."""
        running.over.set()
        if running.renewing is not None:
            await asyncio.wait({running.renewing})

    async def _excuse(self, attempt: Attempt, within_s: float | None) -> None:
        try:
            async with asyncio.timeout(within_s):
                await self._attempts.excuse(attempt)
        except StorageUnavailable as error:
            reason = str(error)
        except TimeoutError:
            reason = "storage did not answer in time"
        else:
            return
        log.warning("an interrupted attempt counts", task_id=attempt.task_id, reason=reason)
