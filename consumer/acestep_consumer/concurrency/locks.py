# SPDX-License-Identifier: Apache-2.0
"""Asyncio locks: shared or exclusive, and one per key."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class SharedLock:
    """A shared/exclusive lock for the coroutines of one event loop.

    Waiting exclusive holders go first: while one waits, no shared one gets the lock. Otherwise the order is that of
    arrival. A coroutine that is cancelled while it waits, or right when it gets the lock, leaves it as it was.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._one_alone = False
        self._for_alone: deque[asyncio.Future[None]] = deque()
        self._for_company: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the lock shared; wait while it is held or awaited exclusively."""
        await self._enter(self._for_company)
        try:
            yield
        finally:
            self._leave()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold the lock exclusively; wait until all holders have released it."""
        await self._enter(self._for_alone)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, line: "deque[asyncio.Future[None]]") -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.append(turn)
        self._call_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                # The one who gave up may have been what the others waited for.
                self._call_in()
            else:
                self._leave()
            raise

    def _leave(self) -> None:
        self._inside -= 1
        self._one_alone = False
        self._call_in()

    def _call_in(self) -> None:
        """Give a place to everybody who may have one now."""
        while self._for_alone and self._for_alone[0].cancelled():
            self._for_alone.popleft()
        while line := self._next_line():
            turn = line.popleft()
            if not turn.cancelled():
                self._inside += 1
                self._one_alone = line is self._for_alone
                turn.set_result(None)

    def _next_line(self) -> "deque[asyncio.Future[None]] | None":
        if self._one_alone:
            return None
        if self._for_alone:
            return None if self._inside else self._for_alone
        return self._for_company or None


class KeyedLock:
    """A lock per key that exists only while somebody holds or awaits it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """Wait for this key's turn."""
        lock, waiting = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, waiting + 1)
        try:
            async with lock:
                yield
        finally:
            self._leave(key)

    def _leave(self, key: str) -> None:
        lock, waiting = self._locks[key]
        if waiting == 1:
            del self._locks[key]
        else:
            self._locks[key] = (lock, waiting - 1)
