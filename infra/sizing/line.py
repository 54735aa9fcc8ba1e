# SPDX-License-Identifier: Apache-2.0
"""One queue in front of many places of work, first come, first served: the model, as a pure function.

A place is one job in one worker's hands; a worker has as many as its prefetch. The broker holds ``limit`` waiting
messages and refuses the next one, as RabbitMQ does on publisher confirms. With exponential gaps and times this is
M/M/c/c+limit, whose formulas the tests compare it with.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it comes, and how long it takes a place. Seconds."""

    at_s: float
    takes_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What happened.

    Attributes:
        waits_s: seconds from arrival to a place, ascending; one for each request that was accepted.
        refused: requests that found the queue full.
        busy_s: seconds of work, over all places.
        lasted_s: from the first arrival to the last end.
        longest_queue: most requests that waited at a time.
        places: how many there were.
    """

    waits_s: tuple[float, ...]
    refused: int
    busy_s: float
    lasted_s: float
    longest_queue: int
    places: int

    @property
    def utilisation(self) -> float:
        """Share of the places' time in which they had work, 0 to 1."""
        return self.busy_s / (self.places * self.lasted_s) if self.lasted_s > 0 else 0.0

    @property
    def mean_wait_s(self) -> float:
        """Mean wait of the accepted, seconds; 0 without any."""
        return sum(self.waits_s) / len(self.waits_s) if self.waits_s else 0.0

    def wait_s(self, share: float) -> float:
        """Return the wait that ``share`` (0 to 1) of the accepted requests do not exceed, seconds; 0 without any."""
        if not self.waits_s:
            return 0.0
        return self.waits_s[min(len(self.waits_s) - 1, int(share * len(self.waits_s)))]


def replay(requests: Sequence[Request], places: int, limit: int) -> Run:
    """Send ``requests``, in the order of their arrival, through ``places`` places with ``limit`` waiting at most.

    Raises:
        ValueError: the requests are not in order, or there is no place.
    """
    if places < 1:
        raise ValueError("without a place nothing is ever done")
    free_at = [0.0] * places if not requests else [requests[0].at_s] * places
    waiting: deque[float] = deque()  # when each begins; first come, first served, so that it ascends
    waits: list[float] = []
    refused = longest = 0
    busy = 0.0
    before = float("-inf")
    for request in requests:
        if request.at_s < before:
            raise ValueError("the requests are not in the order of their arrival")
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
        heapq.heapreplace(free_at, begins + request.takes_s)
        waits.append(begins - request.at_s)
        busy += request.takes_s
    lasted = max(free_at) - requests[0].at_s if requests else 0.0
    return Run(
        waits_s=tuple(sorted(waits)),
        refused=refused,
        busy_s=busy,
        lasted_s=lasted,
        longest_queue=longest,
        places=places,
    )
