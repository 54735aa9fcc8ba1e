# SPDX-License-Identifier: Apache-2.0
"""How fast work is done while nothing is changed: a measurement that says when it may be believed.

Songs of one pack end together, so finished work grows in steps. A line fitted through all readings is hardly disturbed
by where in a step the measurement begins and ends; the difference of the two ends would be.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The worker at one moment.

    Attributes:
        now_s: seconds of any steady clock.
        finished: jobs finished so far.
        work: what they were worth so far, in the unit that throughput is to be measured in.
        in_hand: jobs accepted and not finished.
        memory: share of the device's memory in use, 0 to 1; None: not known.
        squeezes: times so far that memory made a pack smaller, or work wait.
    """

    now_s: float
    finished: int
    work: float
    in_hand: int
    memory: float | None = None
    squeezes: int = 0


class Throughput:
    """One measurement with a fixed number of workers.

    Args:
        workers: how many there are.
        begin_after: jobs that must be finished before it begins: they were started under another number.
    """

    def __init__(self, workers: int, begin_after: int) -> None:
        self._workers = workers
        self._begin_after = begin_after
        self._first: Reading | None = None
        self._last: Reading | None = None
        self._readings = 0
        self._in_hand = 0
        # Sums over readings of time and work, each since the first reading.
        self._time = self._work = self._time_squared = self._time_work = 0.0

    def add(self, reading: Reading) -> None:
        """Take in one reading; those before the beginning are ignored."""
        if self._first is None:
            if reading.finished < self._begin_after or reading.in_hand > self._workers:
                return
            self._first = reading
        time, work = reading.now_s - self._first.now_s, reading.work - self._first.work
        self._last = reading
        self._readings += 1
        self._in_hand += min(reading.in_hand, self._workers)
        self._time += time
        self._work += work
        self._time_squared += time * time
        self._time_work += time * work

    @property
    def seconds(self) -> float:
        """How long it has gone on."""
        return self._last.now_s - self._first.now_s if self._first and self._last else 0.0

    @property
    def finished(self) -> int:
        """Jobs finished in it."""
        return self._last.finished - self._first.finished if self._first and self._last else 0

    @property
    def fullness(self) -> float:
        """Share of the workers that had a job, 0 to 1, on average."""
        return self._in_hand / (self._readings * self._workers) if self._readings else 0.0

    @property
    def rate(self) -> float:
        """Work a second: the slope of the line through all readings. 0 before there are two."""
        spread = self._readings * self._time_squared - self._time * self._time
        return (self._readings * self._time_work - self._time * self._work) / spread if spread > 0 else 0.0
