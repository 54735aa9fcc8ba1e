# SPDX-License-Identifier: Apache-2.0
"""What this worker has done, as plain numbers: counted where it happens, read when Prometheus asks.

Counting a job takes a few microseconds: dictionaries and lists of numbers, no locks, all on the event loop. No label
grows with the work: task ids never are one, and what a producer may name is counted under the names that are loaded.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import structlog

from acestep_consumer.domain.job import Job
from acestep_consumer.domain.outcome import Ending
from acestep_consumer.execution.context import JobContext
from acestep_consumer.execution.eta import CostModel
from acestep_consumer.observability.tracing import note_end
from acestep_schemas.events import Completed, ErrorCode, Timings, Unfinished

NONE: Final = "none"
"""Stands for the model or the tier of a job that never got so far as to have one."""

OTHER: Final = "other"
"""Stands for every further name, once there are ``MOST_NAMES``."""

MOST_NAMES: Final = 16
STAGES: Final = tuple(Timings.model_fields)
BOUNDS_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
"""Upper bounds of the buckets of seconds: an upload on the left, a long song on a small card on the right."""

ERROR_BOUNDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2, 4)
"""Upper bounds of the buckets of an estimate's error, as a share of what the job took."""


class Histogram:
    """Numbers by size. ``bounds`` are the buckets' upper ends, ascending; one more bucket takes what is larger."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = BOUNDS_S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one number."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class JobStats:
    """All jobs of this worker. ``job_ended`` is called once for each, when its terminal event is confirmed."""

    jobs: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By state, model and tier."""
    errors: Counter[str] = field(default_factory=lambda: Counter({code.value: 0 for code in ErrorCode}))
    """By code. All are there from the start: a rate cannot see the first of a series that was not."""
    stages: dict[str, Histogram] = field(default_factory=lambda: {stage: Histogram() for stage in STAGES})
    redeliveries: int = 0
    retries: int = 0
    """Jobs that ended on another than their first attempt."""
    repeats: int = 0
    lm_codes: int = 0
    """Audio codes that the language model wrote. Each is one token, and 5 are a second of song."""
    expected_s: float = 0.0
    """Of the jobs that had an estimate."""
    estimated_s: float = 0.0
    """What the same jobs took in the end."""
    estimate_error: Histogram = field(default_factory=lambda: Histogram(ERROR_BOUNDS))
    _names: set[str] = field(default_factory=set)

    def job_ended(
        self,
        ending: Completed | Unfinished,
        job: Job | None,
        *,
        redelivered: bool = False,
        timings: Timings | None = None,
        expected_s: float | None = None,
    ) -> None:
        """Count one job.

        Args:
            ending: what its terminal event says.
            job: what policy made of it; None: the message did not get so far.
            redelivered: whether somebody had the message before.
            timings: seconds per stage of a job without songs; one with songs brings its own.
            expected_s: seconds from start to end that were estimated when it began; None: no estimate.
        """
        state = "completed" if isinstance(ending, Completed) else ending.status
        self.jobs[state, self._known(job.model.used if job else None), self._known(_tier(ending))] += 1
        self.redeliveries += redelivered
        self.retries += ending.attempt > 1
        if isinstance(ending, Completed):
            timings = ending.timings
            self.lm_codes += _codes(ending)
        else:
            self.errors[ending.error.code.value] += 1
        if timings is not None:
            self._time(timings, expected_s)

    def event_repeated(self) -> None:
        """Count a message whose job was done already: its event was published again, nothing was rendered."""
        self.repeats += 1

    def _time(self, timings: Timings, expected_s: float | None) -> None:
        for stage, histogram in self.stages.items():
            seconds: float | None = getattr(timings, stage)
            if seconds is not None:
                histogram.add(seconds)
        if expected_s is not None and timings.total:
            self.expected_s += expected_s
            self.estimated_s += timings.total
            self.estimate_error.add(abs(expected_s - timings.total) / timings.total)

    def _known(self, name: str | None) -> str:
        if name is None:
            return NONE
        if name not in self._names:
            if len(self._names) >= MOST_NAMES:
                return OTHER
            self._names.add(name)
        return name


def _tier(ending: Completed | Unfinished) -> str | None:
    return ending.policy.tier if ending.policy else None


def _codes(ending: Completed) -> int:
    """Audio codes that the language model wrote, not those that came with the request."""
    written = ending.lm is not None and not ending.request.audio_code_string
    return sum(map(len, ending.audio_codes)) if written else 0


class Refusals:
    """Publishes of ours that the broker did not confirm, by what was wrong."""

    KINDS: Final = ("nacked", "unroutable")

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(self.KINDS, 0))

    def add(self, fault: Exception) -> None:
        """Count a publish that the broker refused; a lost connection is no refusal."""
        kind = type(fault).__name__.lower()
        if kind in self.KINDS:
            self.counts[kind] += 1


log = structlog.get_logger()


class JobObserver:
    """Sees the jobs of one worker.

    Args:
        tally: counts them.
        costs: learns what they take.
    """

    def __init__(self, tally: JobStats, costs: CostModel) -> None:
        self._tally = tally
        self._costs = costs

    def ended(self, context: JobContext, ending: Ending) -> None:
        """Count a job whose terminal event is confirmed."""
        if context.answer is not None:
            self._tally.event_repeated()
            log.info("job had ended before: event repeated")
            return
        note_end(ending)
        expected_s = context.estimate.expected_s if context.estimate else None
        self._tally.job_ended(ending, context.job, redelivered=context.delivery.redelivered, expected_s=expected_s)
        if not isinstance(ending, Completed):
            return  # the runner has logged the reason
        total_s = ending.timings.total
        log.info("job done", songs=len(ending.audios), total_s=total_s, attempt=ending.attempt)
        if context.job and total_s is not None:
            self._costs.learn(context.job, _music_s(ending), total_s)


def _music_s(ending: Completed) -> float:
    """Seconds of music that were made, all songs together."""
    planned = ending.request.audio_duration
    return sum(audio.duration_s if planned is None else planned for audio in ending.audios)
