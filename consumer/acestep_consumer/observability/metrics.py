# SPDX-License-Identifier: Apache-2.0
"""The metrics page of a worker: its registry, and the metrics whose values other parts know.

Those are read at each scrape and stored nowhere; what has to be counted is in ``job_stats.py``. Each function yields
the metrics of one subject; ``worker/readiness.py`` puts them together.
"""

import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from acestep_consumer.domain.objects import Traffic
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.engine.messages import StartPhase

_GIB = 1 << 30


class ConsumerState(Protocol):
    """The consumer of the request queue, as far as it is measured: ``acestep_consumer.broker.consumer.Consumer``."""

    @property
    def in_hand(self) -> int:
        """Deliveries whose handler has not returned."""

    @property
    def prefetch(self) -> int:
        """Most deliveries at a time."""


class Metrics:
    """The metrics page. Each worker has a registry of its own: tests run several in one process.

    Args:
        sources: called at each scrape; each yields some of the metrics.
    """

    def __init__(self, *sources: Callable[[], Iterable[Metric]]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter and histogram
        self._registry = CollectorRegistry(auto_describe=False)
        for source in sources:
            self._registry.register(_Source(source))

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return body and content type, in the format that the ``Accept`` header prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Source(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


def process_metrics() -> Iterator[Metric]:
    """Version of the program, and the memory, CPU time and open files of this process (not of the engines')."""
    try:
        release = version("acestep-consumer")
    except PackageNotFoundError:  # run from a checkout
        release = "unknown"
    about = "Always 1; the labels are the versions of acestep-consumer and of Python."
    build = GaugeMetricFamily("acestep_build_info", about, labels=("version", "python"))
    build.add_metric((release, platform.python_version()), 1)
    yield build
    yield from ProcessCollector(registry=None).collect()


def worker_metrics(consumer: ConsumerState | None, queue_limit: int) -> Iterator[Metric]:
    """Running jobs. The queue's limit is a setting: RabbitMQ has metrics of a queue's length, and none of its limit."""
    workers, running = (consumer.prefetch, consumer.in_hand) if consumer else (0, 0)
    yield GaugeMetricFamily("acestep_workers", "Most concurrent jobs of this worker (its prefetch).", workers)
    yield GaugeMetricFamily("acestep_in_hand", "Deliveries that this worker has not settled.", running)
    yield GaugeMetricFamily("acestep_queue_limit", "Most messages that the request queue takes.", queue_limit)


def stage_metrics(
    jobs: Mapping[str, int], waiting: Mapping[str, int], limits: Mapping[str, int | None]
) -> Iterator[Metric]:
    """Running jobs, those of them that wait for a place, and the limit, by stage; no sample for a stage without one."""
    yield _gauges("acestep_stage_jobs", "Running jobs in this stage, those that wait in it included.", "stage", jobs)
    yield _gauges("acestep_stage_waiting", "Running jobs that wait for a place in this stage.", "stage", waiting)
    known = {stage: limit for stage, limit in limits.items() if limit is not None}
    about = "About how many jobs this stage takes at once; no sample where nothing limits it."
    yield _gauges("acestep_stage_limit", about, "stage", known)


def readiness_metrics(checks: Mapping[str, bool]) -> Iterator[Metric]:
    """Conditions of readiness, 1 or 0. They must be known already: a scrape must not wait."""
    yield _gauges("acestep_ready", "Whether this condition of readiness holds.", "check", checks)


def storage_metrics(traffic: Traffic, *, away: bool) -> Iterator[Metric]:
    """Traffic of the object storage, and whether it is out of reach."""
    yield CounterMetricFamily("acestep_s3_sent_bytes", "Bytes sent to S3.", traffic.sent_bytes)
    yield CounterMetricFamily("acestep_s3_received_bytes", "Bytes received from S3.", traffic.received_bytes)
    yield CounterMetricFamily("acestep_s3_retries", "Retries of calls to S3.", traffic.retries)
    yield GaugeMetricFamily("acestep_s3_away", "Whether S3 is out of reach and jobs wait for it.", away)


def forwarding_metrics(forwarded: Mapping[str, int]) -> Iterator[Metric]:
    """Requests that went to workers of larger tiers, by tier; no sample without tier routing."""
    about = "Requests forwarded to workers of a larger tier, by that tier."
    yield _counters("acestep_requests_sent_on", about, "tier", forwarded)


def scratch_metrics(folder: Path) -> Iterator[Metric]:
    """The disk of the scratch folder; nothing while there is no such folder."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return
    yield GaugeMetricFamily("acestep_scratch_free_bytes", "Free bytes on the disk of the scratch folder.", disk.free)
    yield GaugeMetricFamily("acestep_scratch_size_bytes", "Size of the disk of the scratch folder.", disk.total)


def renderer_metrics(usage: DeviceUsage) -> Iterator[Metric]:
    """The renderer's device. An unknown value has no sample, since 0 would be a claim."""
    now, idle = usage.stats, usage.idle_share(time.monotonic())
    for name, about, value in (
        ("acestep_gpu_idle_ratio", "Share of the last minute in which the device had no work.", idle),
        ("acestep_vram_used_bytes", "Device memory in use by the renderer.", _bytes(now.memory_gb) if now else None),
        (
            "acestep_vram_limit_bytes",
            "The renderer's share of device memory.",
            _bytes(now.memory_limit_gb) if now else None,
        ),
        ("acestep_pack_songs", "Songs in the batch of the last denoising step.", now.songs_in_pack if now else None),
        ("acestep_pack_tokens", "Tokens in the batch of the last denoising step.", now.tokens_in_pack if now else None),
    ):
        yield GaugeMetricFamily(name, about, value)
    about = "Times that a lack of device memory made a batch smaller, or jobs wait."
    yield CounterMetricFamily("acestep_memory_squeezes", about, usage.reductions)


def engine_metrics(restarts: Mapping[str, int]) -> Iterator[Metric]:
    """Restarts of the engine processes, by engine."""
    yield _counters("acestep_engine_restarts", "Times that an engine process was replaced.", "engine", restarts)


def startup_metrics(starts: Mapping[str, Mapping[StartPhase, float]]) -> Iterator[Metric]:
    """Seconds of the engine processes' last starts, by engine and phase."""
    about = "Seconds of the parts of an engine process's last start; `waiting` is for the other engine."
    seconds = GaugeMetricFamily("acestep_startup_seconds", about, labels=("engine", "phase"))
    for engine, phases in starts.items():
        for phase, value in phases.items():
            seconds.add_metric((engine, phase), value)
    yield seconds


def _gauges(name: str, about: str, label: str, values: Mapping[str, float]) -> Metric:
    return _filled(GaugeMetricFamily(name, about, labels=(label,)), values)


def _counters(name: str, about: str, label: str, values: Mapping[str, float]) -> Metric:
    return _filled(CounterMetricFamily(name, about, labels=(label,)), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]) -> Metric:
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _bytes(gib: float) -> float | None:
    """GiB as bytes; 0 means that the process does not know."""
    return gib * _GIB or None
