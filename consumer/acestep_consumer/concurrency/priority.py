# SPDX-License-Identifier: Apache-2.0
"""Waiting queues in order of priority, in which nobody waits for ever.

A priority is a head start: each level counts as ``HEAD_START_S`` seconds of waiting. So priority 9 passes everything
that came within four and a half minutes before it with priority 0, and nothing that has waited longer than that.
"""

import time
from collections.abc import Callable, MutableSequence
from typing import Final, TypeVar

T = TypeVar("T")

HEAD_START_S: Final = 30.0
"""Seconds of waiting that one level of priority is worth."""


def rank_of(priority: int, now_s: float | None = None) -> float:
    """Return the place of a job that arrives now, or at ``now_s`` of the monotonic clock: lower ones go first."""
    return (time.monotonic() if now_s is None else now_s) - HEAD_START_S * priority


def insert(queue: MutableSequence[T], item: T, rank: Callable[[T], float]) -> None:
    """Insert an item behind all whose rank is not higher: among equals the order is that of arrival."""
    place, own = len(queue), rank(item)
    while place and rank(queue[place - 1]) > own:
        place -= 1
    queue.insert(place, item)
