# SPDX-License-Identifier: Apache-2.0
"""Arrival times of requests: recorded in a file, or random with a seed."""

import csv
import json
import random
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

TIME_COLUMNS = ("at", "time", "timestamp")
HOUR_S = 3600.0

# Mean durations of the quiet and busy phases of bursty traffic.
QUIET_S, BUSY_S = 600.0, 120.0


class TraceUnreadableError(ValueError):
    """A file is malformed; the message says where, and what is expected."""


def read_trace(path: Path) -> list[float]:
    """Read arrival times, in seconds since the first, ascending.

    CSV: seconds or ISO 8601 times in the first column, or in the one named ``at``, ``time`` or ``timestamp``. Events,
    one per line: those of completed jobs, from which the time of the request is calculated.

    Raises:
        TraceUnreadableError: a value is not a time, or there are none.
    """
    text = path.read_text(encoding="utf-8-sig")
    times = sorted(_times_of_events(text) if text.startswith("{") else _times_of_csv(text, path))
    if not times:
        raise TraceUnreadableError(
            f"{path} has no arrival times: expected seconds, ISO 8601 times or `completed` events, one per line"
        )
    return [time - times[0] for time in times]


def poisson(an_hour: float, hours: float, seed: int) -> list[float]:
    """Return Poisson arrivals, on average ``an_hour`` per hour, over ``hours``; in seconds."""
    return list(_until(hours * HOUR_S, _poisson(an_hour / HOUR_S, random.Random(seed))))  # noqa: S311 - not for security


def bursty(an_hour: float, hours: float, peak: float, seed: int) -> list[float]:
    """Return bursty arrivals: the same mean, but ``peak`` times that in busy phases, a sixth of the time.

    Raises:
        ValueError: ``peak`` is below 1, or so high that nothing would arrive outside bursts.
    """
    share = BUSY_S / (QUIET_S + BUSY_S)
    if not 1 <= peak <= 1 / share:
        raise ValueError(f"--peak must be 1 to {1 / share:g} times the mean")
    mean = an_hour / HOUR_S
    rates = (mean * (1 - peak * share) / (1 - share), mean * peak)
    return list(_until(hours * HOUR_S, _switching(rates, random.Random(seed))))  # noqa: S311 - as above


def denser(times: Iterable[float], factor: float) -> list[float]:
    """Return the same arrivals, ``factor`` times as frequent."""
    return [time / factor for time in times]


def _poisson(rate: float, rng: random.Random) -> Iterator[float]:
    now = 0.0
    while rate > 0:
        now += rng.expovariate(rate)
        yield now


def _switching(rates: tuple[float, float], rng: random.Random) -> Iterator[float]:
    """Yield Poisson arrivals whose rate alternates between two values, each for an exponential time."""
    now, busy = 0.0, False
    while True:
        end = now + rng.expovariate(1 / (BUSY_S if busy else QUIET_S))
        for at in _poisson(rates[busy], rng):
            if now + at > end:
                break
            yield now + at
        now, busy = end, not busy


def _until(end: float, times: Iterator[float]) -> Iterator[float]:
    for time in times:
        if time > end:
            return
        yield time


def _times_of_csv(text: str, path: Path) -> list[float]:
    rows = [row for row in csv.reader(text.splitlines()) if row and row[0].strip()]
    column, first = 0, 1
    if rows and not _is_time(rows[0][0]):
        names = [name.strip().lower() for name in rows[0]]
        column = next((number for number, name in enumerate(names) if name in TIME_COLUMNS), 0)
        rows, first = rows[1:], 2
    return [_time_of(row, column, f"{path}, line {line}") for line, row in enumerate(rows, first)]


def _times_of_events(text: str) -> Iterator[float]:
    """Yield the end of each completed job, minus the time that it ran and waited."""
    for line in filter(None, text.splitlines()):
        try:
            data = json.loads(line)["data"]
            timings = data["timings"]
            yield _seconds(data["finished_at"]) - timings["total"] - (timings.get("queued") or 0.0)
        except (ValueError, KeyError, TypeError):
            continue  # another event, or a line cut off by Ctrl-C


def _is_time(text: str) -> bool:
    try:
        _seconds(text)
    except ValueError:
        return False
    return True


def _time_of(row: list[str], column: int, where: str) -> float:
    text = row[column] if column < len(row) else ""
    try:
        return _seconds(text)
    except ValueError:
        raise TraceUnreadableError(
            f"{where}: {text!r} is not a time; expected seconds or ISO 8601, such as 12.5 or 2026-02-03T04:05:06Z"
        ) from None


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text.strip()).timestamp()
