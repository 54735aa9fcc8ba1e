# SPDX-License-Identifier: Apache-2.0
"""Tries of messages that may kill: counted, bounded, and the last one made alone, so that nobody dies of a neighbour.

When a worker dies, all that it had in hand comes again, and one of these messages may be the cause. Most often none
is. So they are tried together again as long as they may be; who has one try left has it with nobody else in the room.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

from acestep_consumer.concurrency.locks import SharedLock
from acestep_consumer.domain.errors import Interrupted, StorageUnavailable, WorkerLost
from acestep_consumer.domain.job import Attempt
from acestep_consumer.domain.ports import AttemptStore, Delivery


class RetryPolicy:
    """The tries that are being made.

    Args:
        attempts: remembers them.
        most: tries that may end without a word.
    """

    def __init__(self, attempts: AttemptStore, most: int) -> None:
        self._attempts = attempts
        self._most = most
        self._room = SharedLock()
        self._running: dict[Attempt, Delivery] = {}

    @asynccontextmanager
    async def of(self, task_id: str, delivery: Delivery) -> AsyncIterator[Attempt]:
        """Make the next try of a message. Raises ``WorkerLost`` when it has had all that it may have."""
        known = delivery.fingerprint
        attempt = await self._attempts.next(task_id, known, redelivered=delivery.redelivered)
        if attempt.unexplained >= self._most:
            raise WorkerLost(attempt.unexplained, attempt.number - 1)
        async with self._place_of(attempt):
            await self._attempts.begin(attempt)
            self._running[attempt] = delivery
            try:
                yield attempt
            except (asyncio.CancelledError, Interrupted):
                await self._excuse(attempt)
                raise
            finally:
                self._running.pop(attempt, None)

    def left(self, attempt: Attempt) -> int:
        """Return the tries that a message has, this one among them."""
        return self._most - attempt.unexplained

    async def excuse_lost(self) -> None:
        """Excuse the tries whose messages the broker has taken back: their worker lives, only its connection died."""
        lost = [attempt for attempt, delivery in self._running.items() if delivery.stale]
        await asyncio.gather(*map(self._excuse, lost))

    def _place_of(self, attempt: Attempt) -> AbstractAsyncContextManager[None]:
        alone = attempt.unexplained > 0 and self.left(attempt) == 1
        return self._room.alone() if alone else self._room.shared()

    async def _excuse(self, attempt: Attempt) -> None:
        with suppress(StorageUnavailable):  # then it counts, which is a pity and no more
            await self._attempts.excuse(attempt)
