# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads. Nothing is counted here: at every scrape, collectors ask those who know.

A collector is a small class with one subject. ``Metrics`` holds them in a registry of this worker's own, so that two
workers in one process, as in tests, do not meet. Another subject is another class here and one more in
``observation.py``.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from acestep_consumer.domain.objects import Traffic
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.engine.messages import EngineStats
from acestep_consumer.observability.job_stats import Histogram, JobStats, Refusals

_GIB = 1 << 30


class ConsumerState(Protocol):
    """What the broker's side of the worker tells: ``acestep_consumer.broker.consumer.Consumer``."""

    @property
    def in_hand(self) -> int:
        """Deliveries whose handler has not returned."""

    @property
    def prefetch(self) -> int:
        """Deliveries that may be in hand."""


class Metrics:
    """The worker's metrics, as the text that Prometheus reads."""

    def __init__(self, *collectors: Collector) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        for collector in collectors:
            self._registry.register(collector)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return body and content type, in the format that the ``Accept`` header prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class WorkerCollector(Collector):
    """The jobs in this worker's hands. ``consumer`` returns None until messages are taken.

    ``queue_limit`` is the setting: RabbitMQ's own metrics tell how long a queue is, and not how long it may be.
    """

    def __init__(self, consumer: Callable[[], ConsumerState | None], queue_limit: int) -> None:
        self._consumer = consumer
        self._queue_limit = queue_limit

    def collect(self) -> Iterator[Metric]:
        """Yield the families; 0 before the start."""
        consumer = self._consumer()
        workers, in_hand = (consumer.prefetch, consumer.in_hand) if consumer else (0, 0)
        yield GaugeMetricFamily("acestep_workers", "Jobs that may be in this worker's hands (its prefetch).", workers)
        yield GaugeMetricFamily("acestep_in_hand", "Jobs in this worker's hands.", in_hand)
        yield GaugeMetricFamily("acestep_queue_limit", "Messages that may wait in the queue.", self._queue_limit)


class ReadyCollector(Collector):
    """Whether work can be done, by condition. ``checks`` must answer at once, from what is known."""

    def __init__(self, checks: Callable[[], Mapping[str, bool]]) -> None:
        self._checks = checks

    def collect(self) -> Iterator[Metric]:
        """Yield the family: 1 where the condition holds, 0 where not."""
        ready = GaugeMetricFamily("acestep_ready", "Whether this condition for work holds.", labels=["check"])
        for name, holds in self._checks().items():
            ready.add_metric([name], holds)
        yield ready


class JobCollector(Collector):
    """The jobs that came to an end."""

    def __init__(self, tally: JobStats) -> None:
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        tally = self._tally
        yield _by(("state", "model", "tier"), "acestep_jobs", "Jobs that ended.", tally.jobs.items())
        errors = (((code,), count) for code, count in tally.errors.items())
        yield _by(("code",), "acestep_job_errors", "Jobs that ended without songs, by reason.", errors)
        stages = HistogramMetricFamily("acestep_stage_seconds", "Seconds of a job's stages.", labels=["stage"])
        for stage, histogram in tally.stages.items():
            stages.add_metric([stage], buckets=_buckets(histogram), sum_value=histogram.total)
        yield stages
        error = tally.estimate_error
        about = "Difference of expected and actual seconds of a job, as a share of the latter."
        yield HistogramMetricFamily("acestep_eta_error_ratio", about, _buckets(error), error.total)
        for name, about, value in _OF_JOBS:
            yield CounterMetricFamily(name, about, value(tally))


# Name, help, and where in the tally it is.
_OF_JOBS: tuple[tuple[str, str, Callable[[JobStats], float]], ...] = (
    ("acestep_redeliveries", "Jobs whose message somebody had before.", lambda of: of.redeliveries),
    ("acestep_retried_jobs", "Jobs that ended on a later attempt than the first.", lambda of: of.retries),
    ("acestep_repeated_events", "Messages whose job was done already.", lambda of: of.repeats),
    ("acestep_lm_audio_codes", "Audio codes that the language model wrote; each is a token.", lambda of: of.lm_codes),
    ("acestep_eta_expected_seconds", "Seconds that jobs were expected to take.", lambda of: of.expected_s),
    ("acestep_eta_actual_seconds", "Seconds that the same jobs took.", lambda of: of.estimated_s),
)


class StorageCollector(Collector):
    """The line to S3. ``traffic`` returns None until there is one; ``away`` whether work waits for storage."""

    def __init__(self, traffic: Callable[[], Traffic | None], away: Callable[[], bool]) -> None:
        self._traffic = traffic
        self._away = away

    def collect(self) -> Iterator[Metric]:
        """Yield the families; 0 before the start."""
        traffic = self._traffic() or Traffic()
        yield CounterMetricFamily("acestep_s3_sent_bytes", "Bytes sent to S3.", traffic.sent_bytes)
        yield CounterMetricFamily("acestep_s3_received_bytes", "Bytes received from S3.", traffic.received_bytes)
        yield CounterMetricFamily("acestep_s3_retries", "Tries after the first, of calls to S3.", traffic.retries)
        yield GaugeMetricFamily("acestep_s3_away", "Whether work waits for S3.", self._away())


class PublisherCollector(Collector):
    """The publishes that the broker did not confirm."""

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals

    def collect(self) -> Iterator[Metric]:
        """Yield the family."""
        counts = (((reason,), count) for reason, count in self._refusals.counts.items())
        about = "Publishes that the broker did not confirm."
        yield _by(("reason",), "acestep_publishes_refused", about, counts)


class RoutingCollector(Collector):
    """The requests that larger cards were given. ``sent_on`` tells by the tier's name; empty where nothing is sent."""

    def __init__(self, sent_on: Callable[[], Mapping[str, int]]) -> None:
        self._sent_on = sent_on

    def collect(self) -> Iterator[Metric]:
        """Yield the family, a sample for each tier."""
        counts = (((tier,), count) for tier, count in self._sent_on().items())
        yield _by(("tier",), "acestep_requests_sent_on", "Requests sent on to a larger card, by its tier.", counts)


class ScratchCollector(Collector):
    """The disk that work files lie on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        """Yield the families; without a sample while there is no such folder."""
        try:
            disk = shutil.disk_usage(self._folder)
        except OSError:
            return
        yield GaugeMetricFamily("acestep_scratch_free_bytes", "Free bytes where work files lie.", disk.free)
        yield GaugeMetricFamily("acestep_scratch_size_bytes", "Bytes of the disk where work files lie.", disk.total)


class RendererCollector(Collector):
    """How the renderer uses its device. What is not known has no sample: a gauge of 0 would be a claim."""

    def __init__(self, usage: Callable[[], DeviceUsage]) -> None:
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        usage = self._usage()
        yield from _gauges(usage)
        yield CounterMetricFamily("acestep_songs", "Songs finished.", usage.songs)
        yield CounterMetricFamily("acestep_audio_seconds", "Seconds of audio finished.", usage.audio_s)
        yield CounterMetricFamily(
            "acestep_memory_squeezes", "Times that memory made a pack smaller, or work wait.", usage.reductions
        )


class EngineCollector(Collector):
    """How often each engine's process was replaced. ``restarts`` tells by the engine's name."""

    def __init__(self, restarts: Callable[[], Mapping[str, int]]) -> None:
        self._restarts = restarts

    def collect(self) -> Iterator[Metric]:
        """Yield the family, a sample for each engine."""
        family = CounterMetricFamily(
            "acestep_engine_restarts", "Times that an engine's process was replaced.", labels=("engine",)
        )
        for engine, restarts in self._restarts().items():
            family.add_metric((engine,), restarts)
        yield family


# Name, help, and value in the stats.
_OF_STATS: tuple[tuple[str, str, Callable[[EngineStats], float | None]], ...] = (
    ("acestep_vram_used_bytes", "Device memory in use by the renderer.", lambda now: _bytes(now.memory_gb)),
    ("acestep_vram_limit_bytes", "The renderer's share of device memory.", lambda now: _bytes(now.memory_limit_gb)),
    ("acestep_pack_songs", "Songs of the last denoising step.", lambda now: now.songs_in_pack),
    ("acestep_pack_tokens", "Tokens of the last denoising step.", lambda now: now.tokens_in_pack),
)


def _gauges(usage: DeviceUsage) -> Iterator[Metric]:
    idle = usage.idle_share(time.monotonic())
    yield GaugeMetricFamily("acestep_gpu_idle_ratio", "Share of the last minute in which the device had no work.", idle)
    for name, about, value in _OF_STATS:
        yield GaugeMetricFamily(name, about, value(usage.stats) if usage.stats else None)


def _by(
    labels: tuple[str, ...], name: str, about: str, counts: Iterable[tuple[tuple[str, ...], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, about, labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """The counts as Prometheus wants them: each bucket holds the smaller ones too."""
    ends = (*(str(float(bound)) for bound in histogram.bounds), "+Inf")
    return list(zip(ends, accumulate(histogram.counts), strict=True))


def _bytes(gib: float) -> float | None:
    """GiB as bytes; 0 means that the process does not know."""
    return gib * _GIB or None
