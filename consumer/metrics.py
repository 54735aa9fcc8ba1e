# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads. Nothing is counted here: at every scrape, collectors ask those who know.

A collector is a small class with one subject. ``Metrics`` holds them in a registry of this worker's own, so that two
workers in one process, as in tests, do not meet. Another subject is another class here and one more in ``app.py``.
"""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from consumer.engine.messages import Vitals
from consumer.engine.usage import Usage

_GIB = 1 << 30


class InHand(Protocol):
    """What the broker's side of the worker tells: ``consumer.broker.consumer.Consumer``."""

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
    """The jobs in this worker's hands. ``consumer`` returns None until messages are taken."""

    def __init__(self, consumer: Callable[[], InHand | None]) -> None:
        self._consumer = consumer

    def collect(self) -> Iterator[Metric]:
        """Yield the families; 0 before the start."""
        consumer = self._consumer()
        workers, in_hand = (consumer.prefetch, consumer.in_hand) if consumer else (0, 0)
        yield GaugeMetricFamily("acestep_workers", "Jobs that may be in this worker's hands (its prefetch).", workers)
        yield GaugeMetricFamily("acestep_in_hand", "Jobs in this worker's hands.", in_hand)


class RendererCollector(Collector):
    """How the renderer uses its device. What is not known has no sample: a gauge of 0 would be a claim."""

    def __init__(self, usage: Callable[[], Usage]) -> None:
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        usage = self._usage()
        yield from _gauges(usage)
        yield CounterMetricFamily("acestep_songs", "Songs finished.", usage.songs)
        yield CounterMetricFamily("acestep_audio_seconds", "Seconds of audio finished.", usage.audio_s)
        yield CounterMetricFamily(
            "acestep_memory_squeezes", "Times that memory made a pack smaller, or work wait.", usage.squeezes
        )


# Name, help, and where in the vitals it is.
_OF_VITALS: tuple[tuple[str, str, Callable[[Vitals], float | None]], ...] = (
    ("acestep_vram_used_bytes", "Device memory in use by the renderer.", lambda now: _bytes(now.memory_gb)),
    ("acestep_vram_limit_bytes", "The renderer's share of device memory.", lambda now: _bytes(now.memory_limit_gb)),
    ("acestep_pack_songs", "Songs of the last denoising step.", lambda now: now.songs_in_pack),
    ("acestep_pack_tokens", "Tokens of the last denoising step.", lambda now: now.tokens_in_pack),
)


def _gauges(usage: Usage) -> Iterator[Metric]:
    idle = usage.idle_share(time.monotonic())
    yield GaugeMetricFamily("acestep_gpu_idle_ratio", "Share of the last minute in which the device had no work.", idle)
    for name, about, value in _OF_VITALS:
        yield GaugeMetricFamily(name, about, value(usage.vitals) if usage.vitals else None)


def _bytes(gib: float) -> float | None:
    """GiB as bytes; 0 means that the process does not know."""
    return gib * _GIB or None
