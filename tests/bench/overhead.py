# SPDX-License-Identifier: Apache-2.0
"""What metrics, logs and tracing take of a worker's time: the same worker with all of them on and with all of them off.

Both take turns within one process, stretch by stretch, and only neighbours are compared. In the path of a message are
RabbitMQ, S3 and everything of the worker but the engine, which is done at once: no job is shorter, so that no share is
larger. CPU time is that of all of the worker's threads, the exporter's and its last export included.

A job that ends well writes one line of log.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.table import Table

from tests.bench.arena import BenchError
from tests.bench.observers import Observers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.bench.arena import Arena

SONG_S: Final = 60 / 1165
"""Seconds of the shortest real job: a song of 30 s, 8 steps, packed with others, on one NVIDIA H200."""

_STRETCH: Final = 1_000
_PAIRS_AT_ONCE: Final = 4
_SPANS: Final = 5
"""Of a job: itself, fetch, plan, render, upload."""

_LIMIT_S: Final = 300
_US: Final = 1e6
_CLOCKS: Final = {"cpu": "CPU time", "wall": "wall time"}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two neighbouring stretches: microseconds a job on each clock, without telemetry and with it."""

    off: dict[str, float]
    on: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure: so many pairs of stretches, at this prefetch, with this share of the jobs traced (0 to 1)."""

    prefetch: int
    pairs: int
    traced: float = 1.0

    @property
    def variables(self) -> dict[str, str]:
        """OpenTelemetry's own variables for it."""
        return {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": str(self.traced)}


@dataclass(frozen=True, slots=True)
class Overhead:
    """What was measured."""

    plan: Plan
    pairs: tuple[Pair, ...]

    def summary(self) -> dict[str, Any]:
        """Return a plain document: microseconds a job, and the extra as a share of a job; medians with quartiles."""
        return {
            "prefetch": self.plan.prefetch,
            "traced": self.plan.traced,
            "pairs": len(self.pairs),
            "messages": _STRETCH,
            **{clock: self._of(clock) for clock in _CLOCKS},
        }

    def _of(self, clock: str) -> dict[str, Any]:
        extra = [pair.on[clock] - pair.off[clock] for pair in self.pairs]
        return {
            "job_us": round(statistics.median(pair.off[clock] for pair in self.pairs), 1),
            "extra_us": _spread(extra, 1),
            "share": _spread([pair.on[clock] / pair.off[clock] - 1 for pair in self.pairs], 4),
            "share_of_song": round(statistics.median(extra) / (SONG_S * _US), 5),
        }

    def table(self) -> Table:
        """Return the same for eyes."""
        title = (
            f"Metrics, logs and tracing of {self.plan.traced:.0%} of the jobs, prefetch {self.plan.prefetch}: medians "
            f"of {len(self.pairs)} pairs (and quartiles)"
        )
        table = Table("", box=box.SIMPLE, title=title)
        for about in _CLOCKS.values():
            table.add_column(about, justify="right")
        found = [self._of(clock) for clock in _CLOCKS]
        table.add_row("a job without them", *(f"{of['job_us']:,.0f} µs" for of in found))
        table.add_row("what they add", *(_told(of["extra_us"], "{:,.0f}", " µs") for of in found))
        table.add_row("of this job", *(_told(of["share"], "{:.1%}") for of in found))
        table.add_row("of a song of 30 s", *(f"{of['share_of_song']:.2%}" for of in found))
        return table


def _told(spread: dict[str, float], form: str, unit: str = "") -> str:
    median, low, high = (form.format(spread[name]) for name in ("median", "low", "high"))
    return f"{median}{unit}  ({low} to {high})"


async def overhead(arena: Arena, plan: Plan, tell: Callable[[str], None]) -> Overhead:
    """Measure. The worker is started anew every few pairs, since processes differ, too.

    Raises:
        BenchError: it did not do its work, or not all of it was counted, traced and logged.
    """
    found: list[Pair] = []
    while len(found) < plan.pairs:
        found += await _sitting(arena, plan, min(_PAIRS_AT_ONCE, plan.pairs - len(found)))
        tell(f"telemetry on and off: {len(found)} of {plan.pairs} pairs")
    return Overhead(plan, tuple(found))


async def _sitting(arena: Arena, plan: Plan, pairs: int) -> list[Pair]:
    stretches = 1 + 2 * pairs
    async with Observers() as observers:
        variables = {**observers.variables, **plan.variables, "BENCH_STRETCH": str(_STRETCH)}
        words = await arena.work_off(
            "observed",
            plan.prefetch,
            _STRETCH * stretches,
            _LIMIT_S,
            variables=variables,
            referee=observers.attend,
            log=observers.log,
        )
        _require_all_seen(observers, plan.traced, jobs=_STRETCH * (1 + pairs))
    measured = json.loads(words[-1])
    return [_pair(measured[start : start + 2]) for start in range(0, len(measured), 2)]


def _require_all_seen(observers: Observers, traced: float, *, jobs: int) -> None:
    """With everything on, everything must have arrived: else something cheaper was measured."""
    spans = observers.spans()
    if observers.counted != jobs:
        raise BenchError(f"metrics tell of {observers.counted} jobs of {jobs}")
    if "ready" not in observers.logged():
        raise BenchError("the log does not tell of the start")
    # Who is traced is drawn by lot: five standard deviations, which are none where all or nobody is.
    spread = 5 * sqrt(jobs * traced * (1 - traced))
    if abs(spans / _SPANS - traced * jobs) > spread:
        raise BenchError(f"{spans} spans arrived of {_SPANS} each of {traced:.0%} of {jobs} jobs")


def _pair(stretches: Sequence[dict[str, Any]]) -> Pair:
    by_state = {stretch["on"]: _clocks(stretch) for stretch in stretches}
    return Pair(off=by_state[False], on=by_state[True])


def _clocks(stretch: dict[str, Any]) -> dict[str, float]:
    each = _US / stretch["messages"]
    return {"cpu": stretch["cpu_seconds"] * each, "wall": stretch["seconds"] * each}


def _spread(values: Sequence[float], digits: int) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": round(median, digits), "low": round(low, digits), "high": round(high, digits)}
