# SPDX-License-Identifier: Apache-2.0
"""Slots for threads, which those that wait get in the order of their ranks (``priority.rank_of``)."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from acestep_consumer.concurrency.priority import insert

_CHECK_S = 1.0


class SlotRequest:
    """A thread's place in the queue of ``RankedSlots``, from ``enter`` to ``leave``."""

    def __init__(self, rank: float) -> None:
        self.rank = rank
        self.granted = threading.Event()
        """Set once it has a slot."""


class RankedSlots:
    """So many slots. One that becomes free goes to the request with the lowest rank, among equals to the first."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()
        self._queue: deque[SlotRequest] = deque()

    @contextmanager
    def held(self, rank: float, check: Callable[[], None]) -> Iterator[None]:
        """Wait for a slot, and have it in the body. ``check`` is called every second, and ends the wait by raising."""
        request = self.enter(rank)
        try:
            while not request.granted.wait(_CHECK_S):
                check()
            yield
        finally:
            self.leave(request)

    def enter(self, rank: float) -> SlotRequest:
        """Ask for a slot. The caller waits for ``granted``, and calls ``leave`` in any case."""
        request = SlotRequest(rank)
        with self._lock:
            insert(self._queue, request, lambda each: each.rank)
            self._grant()
        return request

    def enter_now(self) -> SlotRequest | None:
        """Return a granted request, or None where no slot is free that nobody waits for."""
        with self._lock:
            if not self._free:
                return None
            self._free -= 1
        request = SlotRequest(0)
        request.granted.set()
        return request

    def leave(self, request: SlotRequest) -> None:
        """Give the slot back, or the place in the queue up."""
        with self._lock:
            if request.granted.is_set():
                self._free += 1
                self._grant()
            else:
                self._queue.remove(request)

    def _grant(self) -> None:
        while self._free and self._queue:
            self._free -= 1
            self._queue.popleft().granted.set()
