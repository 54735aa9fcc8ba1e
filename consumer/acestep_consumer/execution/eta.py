# SPDX-License-Identifier: Apache-2.0
"""Estimates of a job's duration, learned from the jobs of this worker.

Jobs of one kind (model, steps, with or without the language model) take a fixed time and a time per second of music.
Both follow from least squares over the jobs so far, the latest counting most: a worker that runs more jobs than
before takes longer for each. Nothing is assumed: a kind that was never seen has no estimate.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Final

from acestep_consumer.domain.job import Job

FORGET: Final = 0.95
"""What a job counts for when the next one has come: half of the weight lies on the last 14."""

MOST_KINDS: Final = 64
LATEST: Final = 50
"""Jobs in the mean duration: a long one among them must not count for many."""

ENOUGH: Final = 0.1
"""Progress that says something about the rest where nothing else is known."""

Kind = tuple[str, int, bool]


@dataclass(slots=True)
class RecencyWeightedFit:
    """A straight line through points, weighted by age. Sums are all that it keeps."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Take in a point."""
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, FORGET * getattr(self, name) + value)

    def at(self, x: float | None) -> float:
        """Return y at x; None: at the mean. Only after a point."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x**2
        if x is None or spread <= 1e-6 * (1 + mean_x**2):
            # All were alike: what is longer takes longer in proportion.
            return mean_y if x is None or mean_x <= 0 else mean_y * (0.5 + 0.5 * x / mean_x)
        slope = max(0.0, (self.xy / self.weight - mean_x * mean_y) / spread)
        return max(0.0, mean_y + slope * (x - mean_x))


@dataclass(slots=True, eq=False)
class Estimate:
    """Of one job: ``expected_s`` seconds from its start, None where nothing like it was seen.

    ``progress``, 0 to 1, is the latest that was reported.
    """

    expected_s: float | None
    clock: Callable[[], float] = time.monotonic
    began_s: float = field(init=False)
    progress: float = 0.0

    def __post_init__(self) -> None:
        self.began_s = self.clock()

    def remaining_s(self, progress: float) -> float | None:
        """Return the seconds to come when ``progress``, 0 to 1, is done; None: unknown.

        At first what is known of such jobs counts, later what this one has shown; that alone, once it takes longer than
        such jobs do.
        """
        elapsed = self.clock() - self.began_s
        if self.expected_s is None or elapsed > self.expected_s:
            return elapsed * (1 - progress) / progress if progress >= ENOUGH else None
        by_kind = self.expected_s - elapsed
        by_progress = elapsed * (1 - progress) / progress if progress > 0 else by_kind
        return (1 - progress) * by_kind + progress * by_progress


class CostModel:
    """Estimates durations from finished jobs."""

    def __init__(self) -> None:
        self._kinds: dict[Kind, RecencyWeightedFit] = {}
        self._latest_s: deque[float] = deque(maxlen=LATEST)
        self._running: set[Estimate] = set()

    def expect(self, job: Job) -> Estimate:
        """Estimate a job that begins now."""
        line = self._kinds.get(_kind(job))
        return Estimate(None if line is None else line.at(_music_s(job)))

    def learn(self, job: Job, music_s: float, took_s: float) -> None:
        """Take in what a job took that ended with so many seconds of music, all songs together."""
        if len(self._kinds) < MOST_KINDS or _kind(job) in self._kinds:
            self._kinds.setdefault(_kind(job), RecencyWeightedFit()).add(music_s, took_s)
        self._latest_s.append(took_s)

    @property
    def seconds_per_job(self) -> float | None:
        """Mean seconds of the latest jobs; None before the first."""
        return fmean(self._latest_s) if self._latest_s else None

    @contextmanager
    def running(self, estimate: Estimate) -> Iterator[None]:
        """Count the job of this estimate as running."""
        self._running.add(estimate)
        try:
            yield
        finally:
            self._running.discard(estimate)

    @property
    def remaining_s(self) -> tuple[float | None, ...]:
        """Seconds that each running job still takes, the shortest first; None, last: unknown."""
        known = [each.remaining_s(each.progress) for each in self._running]
        return tuple(sorted(known, key=lambda seconds: (seconds is None, seconds or 0.0)))


def _kind(job: Job) -> Kind:
    return job.model.used, job.request.inference_steps, job.lm is not None


def _music_s(job: Job) -> float | None:
    """Seconds of music that were asked for; None: left to the planner, or to the source audio."""
    duration = job.request.audio_duration
    return None if duration is None else duration * len(job.seeds)
