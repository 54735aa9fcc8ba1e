# SPDX-License-Identifier: Apache-2.0
"""The report of ``top`` on one worker, calculated from its metrics. Pure; ``--json`` prints it unchanged.

A value is None if the worker does not export its family: it may be of another version.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict

WINDOW_S: Final = 60.0


class MetricsUnreadable(Exception):
    """The text is not a worker's metrics."""


class _TopPart(BaseModel):
    model_config = ConfigDict(frozen=True)


class JobsPart(_TopPart):
    """Jobs: running, in all and by stage, most that may run, and ended ones by state.

    Of ``stages``, those in ``stages_waiting`` have no place there yet; ``stage_limits``: places, where limited.
    """

    in_hand: int | None
    workers: int | None
    stages: dict[str, int]
    stages_waiting: dict[str, int]
    stage_limits: dict[str, int]
    ended: dict[str, int]


class SongRatesPart(_TopPart):
    """Delivered songs: total, and per minute lately. ``times_real_time``: seconds of audio delivered per second."""

    total: int | None
    a_minute: float | None
    times_real_time: float | None


class DevicePart(_TopPart):
    """The renderer's device. ``busy``: share of the last minute, 0 to 1, counted when work ends; memory in bytes."""

    busy: float | None
    vram_used: float | None
    vram_limit: float | None
    pack_songs: int | None
    pack_tokens: int | None
    squeezes: int | None


class StoragePart(_TopPart):
    """S3 traffic: total bytes, bytes per second lately, retries, and whether jobs wait for storage."""

    sent: float | None
    received: float | None
    sent_per_s: float | None
    received_per_s: float | None
    retries: int | None
    away: bool | None


class TopReport(_TopPart):
    """The whole report.

    Attributes:
        status: the worker's readiness.
        checks: its readiness checks, by name.
        restarts: of its engine processes, by name.
        stages_s: mean seconds of a job's stages, since the worker's start.
        window_s: seconds over which rates are counted.
    """

    url: str
    status: Literal["ready", "not ready", "unknown"]
    checks: dict[str, bool]
    jobs: JobsPart
    songs: SongRatesPart
    device: DevicePart
    restarts: dict[str, int]
    storage: StoragePart
    stages_s: dict[str, float]
    window_s: float


@dataclass(frozen=True, slots=True)
class MetricsPage:
    """Metrics as they were at ``read_s``, seconds of a monotonic clock."""

    families: Mapping[str, Metric]
    read_s: float

    def value(self, name: str) -> float | None:
        """Return the sum of a family's samples over all labels; None if there are none."""
        found = list(self.by(name).values())
        return sum(found) if found else None

    def by(self, name: str, label: str | None = None) -> dict[str, float]:
        """Return a family's samples by one label, summed over the others. ``name`` is that of the samples."""
        totals: dict[str, float] = {}
        family = self.families.get(name) or self.families.get(name.removesuffix("_total"))
        for sample in family.samples if family else ():
            if sample.name == name:
                key = sample.labels.get(label, "") if label else ""
                totals[key] = totals.get(key, 0.0) + sample.value
        return totals

    def means(self, name: str, label: str) -> dict[str, float]:
        """Return the means of a histogram, by one label."""
        family = self.families.get(name)
        sums, counts = {}, {}
        for sample in family.samples if family else ():
            if sample.name == f"{name}_sum":
                sums[sample.labels.get(label, "")] = sample.value
            elif sample.name == f"{name}_count":
                counts[sample.labels.get(label, "")] = sample.value
        return {key: round(total / counts[key], 3) for key, total in sums.items() if counts.get(key)}


def read_page(text: str, now_s: float) -> MetricsPage:
    """Parse metrics in Prometheus's text format.

    Raises:
        MetricsUnreadable: it is another format, or not a worker's.
    """
    try:
        families = {family.name: family for family in text_string_to_metric_families(text)}
    except ValueError as error:
        raise MetricsUnreadable("its /metrics is not in Prometheus's text format") from error
    if not any(name.startswith("acestep_") for name in families):
        raise MetricsUnreadable("its /metrics has no acestep_ metrics: is it an acestep-consumer worker?")
    return MetricsPage(families, now_s)


class MetricsHistory:
    """The metrics of the last minute, for the rates of counters."""

    def __init__(self) -> None:
        self._pages: deque[MetricsPage] = deque()

    def add(self, page: MetricsPage) -> None:
        """Keep a page. If a counter went back, the worker was restarted, and the window starts over."""
        if self._pages and _went_back(self._pages[-1], page):
            self._pages.clear()
        self._pages.append(page)
        while self._pages[0].read_s < page.read_s - WINDOW_S:
            self._pages.popleft()

    @property
    def window_s(self) -> float:
        """Seconds between the first and the last page."""
        return self._pages[-1].read_s - self._pages[0].read_s if self._pages else 0.0

    def rate(self, name: str) -> float | None:
        """Return a counter's growth per second; None with a single page, or without such a counter."""
        if not self.window_s:
            return None
        before, now = self._pages[0].value(name), self._pages[-1].value(name)
        return None if before is None or now is None else (now - before) / self.window_s


def top_of(url: str, page: MetricsPage, history: MetricsHistory, readiness: Mapping[str, object]) -> TopReport:
    """Calculate the report. ``readiness`` is the body of ``/readyz``; empty if it has none."""
    checks = readiness.get("checks")
    state = readiness.get("status")
    return TopReport(
        url=url,
        status="ready" if state == "ready" else "not ready" if state == "not ready" else "unknown",
        checks={str(name): bool(holds) for name, holds in checks.items()} if isinstance(checks, dict) else {},
        jobs=JobsPart(
            in_hand=_whole(page.value("acestep_in_hand")),
            workers=_whole(page.value("acestep_workers")),
            stages=_by_stage(page, "acestep_stage_jobs"),
            stages_waiting=_by_stage(page, "acestep_stage_waiting"),
            stage_limits=_by_stage(page, "acestep_stage_limit"),
            ended={state: int(count) for state, count in page.by("acestep_jobs_total", "state").items()},
        ),
        songs=_songs(page, history),
        device=_device(page),
        restarts={name: int(count) for name, count in page.by("acestep_engine_restarts_total", "engine").items()},
        storage=_storage(page, history),
        stages_s=page.means("acestep_stage_seconds", "stage"),
        window_s=round(history.window_s, 1),
    )


def _by_stage(page: MetricsPage, name: str) -> dict[str, int]:
    return {stage: int(count) for stage, count in page.by(name, "stage").items()}


def _songs(page: MetricsPage, history: MetricsHistory) -> SongRatesPart:
    rate = history.rate("acestep_songs_total")
    return SongRatesPart(
        total=_whole(page.value("acestep_songs_total")),
        a_minute=None if rate is None else round(60 * rate, 2),
        times_real_time=_rounded(history.rate("acestep_audio_seconds_total")),
    )


def _device(page: MetricsPage) -> DevicePart:
    idle = page.value("acestep_gpu_idle_ratio")
    return DevicePart(
        busy=None if idle is None else round(1 - idle, 4),
        vram_used=page.value("acestep_vram_used_bytes"),
        vram_limit=page.value("acestep_vram_limit_bytes"),
        pack_songs=_whole(page.value("acestep_pack_songs")),
        pack_tokens=_whole(page.value("acestep_pack_tokens")),
        squeezes=_whole(page.value("acestep_memory_squeezes_total")),
    )


def _storage(page: MetricsPage, history: MetricsHistory) -> StoragePart:
    away = page.value("acestep_s3_away")
    return StoragePart(
        sent=page.value("acestep_s3_sent_bytes_total"),
        received=page.value("acestep_s3_received_bytes_total"),
        sent_per_s=_rounded(history.rate("acestep_s3_sent_bytes_total")),
        received_per_s=_rounded(history.rate("acestep_s3_received_bytes_total")),
        retries=_whole(page.value("acestep_s3_retries_total")),
        away=None if away is None else bool(away),
    )


def _went_back(before: MetricsPage, now: MetricsPage) -> bool:
    names = ("acestep_songs_total", "acestep_s3_sent_bytes_total", "acestep_s3_received_bytes_total")
    return any((now.value(name) or 0) < (before.value(name) or 0) for name in names)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
