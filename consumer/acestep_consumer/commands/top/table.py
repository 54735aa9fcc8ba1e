# SPDX-License-Identifier: Apache-2.0
"""Formats the report of ``top`` for a terminal."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from acestep_consumer.commands.terminal import UNKNOWN, number, plural, seconds, share, size
from acestep_consumer.commands.top.report import DevicePart, JobsPart, StoragePart, TopReport

_BAR_WIDTH = 24


def table(top: TopReport) -> RenderableType:
    """Return the report: address and readiness, and below them a row for each figure."""
    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(style="cyan", no_wrap=True)
    rows.add_column(width=_BAR_WIDTH)
    rows.add_column(overflow="fold")
    for name, filled, text in _rows(top):
        rows.add_row(name, _bar(filled), text)
    return Group(_head(top), rows)


def _head(top: TopReport) -> Text:
    style = {"ready": "bold green", "not ready": "bold red", "unknown": "yellow"}[top.status]
    failing = [name for name, holds in top.checks.items() if not holds]
    why = f" ({', '.join(failing)})" if failing else ""
    return Text.assemble((top.url, "bold"), "  ", (top.status + why, style))


def _rows(top: TopReport) -> Iterator[tuple[str, float | None, str]]:
    jobs, songs, device = top.jobs, top.songs, top.device
    yield "running jobs", _of(jobs.in_hand, jobs.workers), f"{number(jobs.in_hand)} of {number(jobs.workers)}"
    yield "by stage", None, ", ".join(_stage(jobs, stage) for stage in jobs.stages) or UNKNOWN
    # The renderer counts a step or a decode when it ends: on a CPU one can take longer than a minute.
    yield "device busy", device.busy, f"{share(device.busy)} in the last minute (finished steps)"
    used, limit = device.vram_used, device.vram_limit
    yield "device memory", _of(used, limit), f"{size(used)} of {size(limit)}"
    yield "batch", None, _batch(device)
    period = f"in the last {seconds(top.window_s)}" if top.window_s else "lately"
    yield "songs delivered", None, f"{number(songs.a_minute)} per minute {period}, {number(songs.total)} total"
    yield "audio delivered", None, f"{number(songs.times_real_time)} s per second"
    yield "jobs ended", None, _ended(jobs)
    yield "mean stage", None, ", ".join(f"{stage} {seconds(mean)}" for stage, mean in top.stages_s.items()) or UNKNOWN
    restarts = ", ".join(f"{engine} {count}" for engine, count in top.restarts.items())
    yield "engine restarts", None, restarts or UNKNOWN
    yield "S3", None, _storage(top.storage)


def _bar(filled: float | None) -> RenderableType:
    if filled is None:
        return ""
    return ProgressBar(total=1.0, completed=min(max(filled, 0.0), 1.0), width=_BAR_WIDTH)


def _of(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _batch(device: DevicePart) -> str:
    songs = UNKNOWN if device.pack_songs is None else plural(device.pack_songs, "song")
    text = f"{songs}, {number(device.pack_tokens)} tokens in the last step"
    return f"{text}; short of memory {plural(device.squeezes, 'time')}" if device.squeezes else text


def _stage(jobs: JobsPart, stage: str) -> str:
    waiting, limit = jobs.stages_waiting.get(stage, 0), jobs.stage_limits.get(stage)
    text = f"{stage} {max(0, jobs.stages[stage] - waiting)}"
    text = text if limit is None else f"{text} of {limit}"
    return f"{text} (+{waiting} waiting)" if waiting else text


def _ended(jobs: JobsPart) -> str:
    return ", ".join(f"{state} {count:,}" for state, count in sorted(jobs.ended.items())) or "none yet"


def _storage(storage: StoragePart) -> str:
    text = f"{size(storage.sent_per_s)}/s up, {size(storage.received_per_s)}/s down, {size(storage.sent)} up in total"
    if storage.retries:
        text = f"{text}; {storage.retries:,} retries"
    return f"{text}; UNREACHABLE, jobs wait" if storage.away else text
