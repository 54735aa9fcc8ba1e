# SPDX-License-Identifier: Apache-2.0
"""``top`` for eyes: one worker as a panel of rows."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from acestep_consumer.commands.terminal import UNKNOWN, number, seconds, share, size
from acestep_consumer.commands.top.report import DevicePart, JobsPart, StoragePart, TopReport

_BAR_WIDTH = 24


def picture(top: TopReport) -> RenderableType:
    """Return the worker as a picture for a terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(width=_BAR_WIDTH)
    table.add_column(overflow="fold")
    for name, filled, text in _rows(top):
        table.add_row(name, _bar(filled), text)
    return Group(_head(top), table)


def _head(top: TopReport) -> Text:
    style = {"ready": "bold green", "not ready": "bold red", "unknown": "yellow"}[top.status]
    failing = [name for name, holds in top.checks.items() if not holds]
    why = f" ({', '.join(failing)})" if failing else ""
    return Text.assemble((top.url, "bold"), "  ", (top.status + why, style))


def _rows(top: TopReport) -> Iterator[tuple[str, float | None, str]]:
    jobs, songs, device = top.jobs, top.songs, top.device
    yield "jobs in hand", _of(jobs.in_hand, jobs.workers), f"{number(jobs.in_hand)} of {number(jobs.workers)}"
    yield "device busy", device.busy, f"{share(device.busy)} of the last minute"
    used, limit = device.vram_used, device.vram_limit
    yield "device memory", _of(used, limit), f"{size(used)} of {size(limit)}"
    yield "pack", None, _pack(device)
    late = f"of late ({seconds(top.window_s)})" if top.window_s else "of late"
    yield "songs a minute", None, f"{number(songs.a_minute)} {late}; {number(songs.total)} in all"
    yield "audio", None, f"{number(songs.times_real_time)} s a second"
    yield "ended", None, _ended(jobs)
    yield "stages", None, ", ".join(f"{stage} {seconds(mean)}" for stage, mean in top.stages_s.items()) or UNKNOWN
    restarts = ", ".join(f"{engine} {count}" for engine, count in top.restarts.items())
    yield "engine restarts", None, restarts or UNKNOWN
    yield "S3", None, _storage(top.storage)


def _bar(filled: float | None) -> RenderableType:
    if filled is None:
        return ""
    return ProgressBar(total=1.0, completed=min(max(filled, 0.0), 1.0), width=_BAR_WIDTH)


def _of(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _pack(device: DevicePart) -> str:
    text = f"{number(device.pack_songs)} songs, {number(device.pack_tokens)} tokens in the last step"
    return f"{text}; memory was short {device.squeezes} times" if device.squeezes else text


def _ended(jobs: JobsPart) -> str:
    return ", ".join(f"{state} {count:,}" for state, count in sorted(jobs.ended.items())) or "none yet"


def _storage(storage: StoragePart) -> str:
    text = f"{size(storage.sent_per_s)}/s up, {size(storage.received_per_s)}/s down; {size(storage.sent)} up in all"
    if storage.retries:
        text = f"{text}; {storage.retries:,} retries"
    return f"{text}; OUT OF REACH, work waits" if storage.away else text
