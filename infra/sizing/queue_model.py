# SPDX-License-Identifier: Apache-2.0
"""Simulates a first-come, first-served queue with many servers (M/M/c/c+limit). Pure.

A slot runs one job at a time; a worker has as many slots as its prefetch. The broker holds ``limit`` waiting messages
and rejects the next one, as RabbitMQ does with publisher confirms. The tests compare the results with the formulas for
exponential interarrival and service times.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One request: its arrival, and how long it occupies a slot. Seconds."""

    at_s: float
    service_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The result of a simulation.

    Attributes:
        waits_s: seconds from arrival to a slot, ascending; one for each accepted request.
        refused: requests that found the queue full.
        busy_s: seconds of service, over all slots.
        lasted_s: from the first arrival to the last end.
        longest_queue: most requests waiting at a time.
        slots: number of slots.
    """

    waits_s: tuple[float, ...]
    refused: int
    busy_s: float
    lasted_s: float
    longest_queue: int
    slots: int

    @property
    def utilisation(self) -> float:
        """Share of time in which the slots were busy, 0 to 1."""
        return self.busy_s / (self.slots * self.lasted_s) if self.lasted_s > 0 else 0.0

    @property
    def mean_wait_s(self) -> float:
        """Mean wait of accepted requests, seconds; 0 without any."""
        return sum(self.waits_s) / len(self.waits_s) if self.waits_s else 0.0

    def wait_s(self, share: float) -> float:
        """Return the quantile ``share`` (0 to 1) of the waits of accepted requests, seconds; 0 without any."""
        if not self.waits_s:
            return 0.0
        return self.waits_s[min(len(self.waits_s) - 1, int(share * len(self.waits_s)))]


def replay(requests: Sequence[Request], slots: int, limit: int) -> Run:
    """Run ``requests``, ordered by arrival, through ``slots`` slots with at most ``limit`` waiting.

    Raises:
        ValueError: the requests are not ordered, or there is no slot.
    """
    if slots < 1:
        raise ValueError("at least one slot is needed")
    free_at = [0.0] * slots if not requests else [requests[0].at_s] * slots
    waiting: deque[float] = deque()  # when each begins, ascending
    waits: list[float] = []
    refused = longest = 0
    busy = 0.0
    before = float("-inf")
    for request in requests:
        if request.at_s < before:
            raise ValueError("the requests are not ordered by arrival")
        before = request.at_s
        while waiting and waiting[0] <= request.at_s:
            waiting.popleft()
        begins = max(request.at_s, free_at[0])
        if begins > request.at_s:
            if len(waiting) >= limit:
                refused += 1
                continue
            waiting.append(begins)
            longest = max(longest, len(waiting))
        heapq.heapreplace(free_at, begins + request.service_s)
        waits.append(begins - request.at_s)
        busy += request.service_s
    lasted = max(free_at) - requests[0].at_s if requests else 0.0
    return Run(
        waits_s=tuple(sorted(waits)),
        refused=refused,
        busy_s=busy,
        lasted_s=lasted,
        longest_queue=longest,
        slots=slots,
    )
