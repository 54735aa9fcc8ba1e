# SPDX-License-Identifier: Apache-2.0
"""Attempts of messages, counted across workers and bounded; the last one runs alone.

When a worker dies, all its messages are redelivered, and one of them may be the cause (a poison message). Most often
none is. So they run together again, until one has a single attempt left: that one runs with no other job beside it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

from acestep_consumer.concurrency.locks import SharedLock
from acestep_consumer.domain.errors import Interrupted, StorageUnavailable, WorkerLost
from acestep_consumer.domain.job import Attempt
from acestep_consumer.domain.ports import AttemptStore, Delivery


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
        self._running: dict[Attempt, Delivery] = {}

    @asynccontextmanager
    async def attempt(self, task_id: str, delivery: Delivery) -> AsyncIterator[Attempt]:
        """Make the body the next attempt at a message. Raises ``WorkerLost`` when none is left."""
        message = delivery.fingerprint
        attempt = await self._attempts.next(task_id, message, redelivered=delivery.redelivered)
        if attempt.unexplained >= self._most:
            raise WorkerLost(attempt.unexplained, attempt.number - 1)
        async with self._lock_for(attempt):
            await self._attempts.begin(attempt)
            self._running[attempt] = delivery
            try:
                yield attempt
            except (asyncio.CancelledError, Interrupted):
                await self._excuse(attempt)
                raise
            finally:
                self._running.pop(attempt, None)

    def remaining(self, attempt: Attempt) -> int:
        """Return the attempts that a message has left, the present one included."""
        return self._most - attempt.unexplained

    async def forget(self, task_id: str, delivery: Delivery) -> None:
        """Remove the records of a message that has ended."""
        with suppress(StorageUnavailable):  # they are small, and harmless
            await self._attempts.forget(task_id, delivery.fingerprint)

    async def excuse_lost(self) -> None:
        """Excuse the attempts whose deliveries are stale: this worker lives, only its connection died."""
        lost = [attempt for attempt, delivery in self._running.items() if delivery.stale]
        await asyncio.gather(*map(self._excuse, lost))

    def _lock_for(self, attempt: Attempt) -> AbstractAsyncContextManager[None]:
        alone = attempt.unexplained > 0 and self.remaining(attempt) == 1
        return self._running_jobs.alone() if alone else self._running_jobs.shared()

    async def _excuse(self, attempt: Attempt) -> None:
        with suppress(StorageUnavailable):  # then it counts as an attempt, no more
            await self._attempts.excuse(attempt)
