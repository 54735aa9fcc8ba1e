# SPDX-License-Identifier: Apache-2.0
"""Limits how many tasks a minute each key may ask for, at one gateway."""

import time
from collections.abc import Callable
from http import HTTPStatus

from acestep_consumer.gateway.answers import busy


class RateLimit:
    """A token bucket for each key: a minute's tasks at once at most, and new ones as time goes on.

    Args:
        per_minute: tasks a minute; 0: no limit.
        clock: returns seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def admit(self, owner: str) -> None:
        """Count a task of this key. Raises ``ApiError`` (429) where it has none left."""
        if not self._per_minute:
            return
        now, rate = self._clock(), self._per_minute / 60
        left, since = self._buckets.get(owner, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * rate)
        if left < 1:
            self._buckets[owner] = left, now
            text = f"this key may ask for {self._per_minute:,} tasks a minute (ACESTEP_API_TASKS_PER_MINUTE)"
            raise busy(HTTPStatus.TOO_MANY_REQUESTS, text, (1 - left) / rate)
        self._buckets[owner] = left - 1, now
