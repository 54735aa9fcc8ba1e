# SPDX-License-Identifier: Apache-2.0
"""Counters and histograms of finished jobs and refused publishes, and the observer that fills them.

No label grows with the number of jobs: task ids are no labels, and of the models and tiers that occur, the first
``MAX_NAMES`` keep their names.
"""

from collections.abc import Iterator
from typing import Final

import structlog
from prometheus_client import Counter, Histogram, Metric

from acestep_consumer.domain.job import Job
from acestep_consumer.domain.outcome import Ending
from acestep_consumer.execution.context import JobContext
from acestep_consumer.execution.eta import CostModel
from acestep_consumer.observability.tracing import StageCounts, note_end
from acestep_schemas.events import Completed, ErrorCode, Timings

NONE: Final = "none"
"""Model or tier of a job that ended before it had one."""

OTHER: Final = "other"
"""Stands for every further name, once there are ``MAX_NAMES``."""

MAX_NAMES: Final = 16
STAGE_BUCKETS_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 900, 1800)
"""Seconds: an upload on the left, a long song on a small GPU on the right; closest where songs and waits are."""

ERROR_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2, 4)
"""Error of an estimate, as a share of the actual time."""


class MetricGroup:
    """Metrics of one subject, collected together."""

    def __init__(self, *metrics: Counter | Histogram) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        for metric in self._metrics:
            yield from metric.collect()


class JobStats(MetricGroup):
    """All jobs of this worker. ``job_ended`` is called once for each, when its terminal event is confirmed.

    ``running`` counts those that have not ended by stage.
    """

    def __init__(self) -> None:
        self.running = StageCounts()
        self._jobs = Counter("acestep_jobs", "Finished jobs.", ("state", "model", "tier"), registry=None)
        errors = Counter(
            "acestep_job_errors", "Jobs that ended without songs, by error code.", ("code",), registry=None
        )
        stages = Histogram(
            "acestep_stage_seconds", "Duration of a job's stages.", ("stage",), buckets=STAGE_BUCKETS_S, registry=None
        )
        self._eta_error = Histogram(
            "acestep_eta_error_ratio",
            "Absolute error of a job's estimated duration, as a share of the actual one.",
            buckets=ERROR_BUCKETS,
            registry=None,
        )
        self._redeliveries = _counter("acestep_redeliveries", "Finished jobs whose message had been redelivered.")
        self._retried = _counter("acestep_retried_jobs", "Jobs that ended on a later attempt than the first.")
        self._repeated = _counter("acestep_repeated_events", "Messages whose job had ended before: event repeated.")
        self._songs = _counter("acestep_songs", "Delivered songs: those of completed jobs, each job once.")
        self._audio_s = _counter("acestep_audio_seconds", "Seconds of delivered audio.")
        self._lm_codes = _counter(
            "acestep_lm_audio_codes", "Audio codes that the language model wrote; each is a token."
        )
        self._expected_s = _counter("acestep_eta_expected_seconds", "Estimated duration of jobs with an estimate.")
        self._actual_s = _counter("acestep_eta_actual_seconds", "Actual duration of the same jobs.")
        # All series exist from the start: a rate misses the first increase of a new one.
        self._errors = {code: errors.labels(code.value) for code in ErrorCode}
        self._stages = {stage: stages.labels(stage) for stage in Timings.model_fields}
        self._names: set[str] = set()
        super().__init__(
            self._jobs,
            errors,
            stages,
            self._eta_error,
            self._redeliveries,
            self._retried,
            self._repeated,
            self._songs,
            self._audio_s,
            self._lm_codes,
            self._expected_s,
            self._actual_s,
        )

    def job_ended(
        self,
        ending: Ending,
        job: Job | None,
        *,
        redelivered: bool = False,
        expected_s: float | None = None,
    ) -> None:
        """Count one job.

        Args:
            ending: the data of its terminal event.
            job: as policy admitted it; None: it was not.
            redelivered: whether its message had been delivered before.
            expected_s: estimated seconds from start to end; None: no estimate.
        """
        state = "completed" if isinstance(ending, Completed) else ending.status
        self._jobs.labels(state, self._bounded(job.model.used if job else None), self._bounded(_tier(ending))).inc()
        self._redeliveries.inc(redelivered)
        self._retried.inc(ending.attempt > 1)
        if isinstance(ending, Completed):
            self._time(ending.timings, expected_s)
            self._songs.inc(len(ending.audios))
            self._audio_s.inc(sum(audio.duration_s for audio in ending.audios))
            self._lm_codes.inc(_codes(ending))
        else:
            self._errors[ending.error.code].inc()

    def event_repeated(self) -> None:
        """Count a message whose job had ended otherwise: that event was published again, nothing else was delivered."""
        self._repeated.inc()

    def _time(self, timings: Timings, expected_s: float | None) -> None:
        for stage, histogram in self._stages.items():
            seconds: float | None = getattr(timings, stage)
            if seconds is not None:
                histogram.observe(seconds)
        if expected_s is not None and timings.total:
            self._expected_s.inc(expected_s)
            self._actual_s.inc(timings.total)
            self._eta_error.observe(abs(expected_s - timings.total) / timings.total)

    def _bounded(self, name: str | None) -> str:
        if name is None:
            return NONE
        if name not in self._names:
            if len(self._names) >= MAX_NAMES:
                return OTHER
            self._names.add(name)
        return name


class Refusals(MetricGroup):
    """Publishes that the broker did not confirm, by reason."""

    REASONS: Final = ("nacked", "unroutable")

    def __init__(self) -> None:
        about = "Publishes that the broker did not confirm."
        counter = Counter("acestep_publishes_refused", about, ("reason",), registry=None)
        self._counters = {reason: counter.labels(reason) for reason in self.REASONS}
        super().__init__(counter)

    def add(self, error: Exception) -> None:
        """Count a refused publish; a lost connection is none."""
        counter = self._counters.get(type(error).__name__.lower())
        if counter is not None:
            counter.inc()


log = structlog.get_logger()


class JobObserver:
    """Records finished jobs of one worker.

    Args:
        stats: counts them.
        costs: learns their duration.
    """

    def __init__(self, stats: JobStats, costs: CostModel) -> None:
        self._stats = stats
        self._costs = costs

    @property
    def running(self) -> StageCounts:
        """Running jobs by stage."""
        return self._stats.running

    def ended(self, context: JobContext, ending: Ending) -> None:
        """Count a job whose terminal event is confirmed."""
        if context.repeated:
            self._stats.event_repeated()
            log.info("job had ended before: event repeated")
            return
        note_end(ending)
        expected_s = context.estimate.expected_s if context.estimate else None
        self._stats.job_ended(ending, context.job, redelivered=context.delivery.redelivered, expected_s=expected_s)
        if not isinstance(ending, Completed):
            return  # the runner has logged the reason
        total_s = ending.timings.total
        log.info("job done", songs=len(ending.audios), total_s=total_s, attempt=ending.attempt)
        if context.job and total_s is not None:
            self._costs.learn(context.job, _music_s(ending), total_s)


def _counter(name: str, about: str) -> Counter:
    return Counter(name, about, registry=None)


def _tier(ending: Ending) -> str | None:
    return ending.policy.tier if ending.policy else None


def _codes(ending: Completed) -> int:
    """Audio codes that the language model wrote, not those that came with the request."""
    written = ending.lm is not None and not ending.request.audio_code_string
    return sum(map(len, ending.audio_codes)) if written else 0


def _music_s(ending: Completed) -> float:
    """Seconds of music in all songs together, those that were made and not kept as well."""
    planned = ending.request.audio_duration
    kept_s = sum(audio.duration_s if planned is None else planned for audio in ending.audios)
    return kept_s * len(ending.candidates) / len(ending.audios) if ending.candidates else kept_s
