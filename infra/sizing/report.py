# SPDX-License-Identifier: Apache-2.0
"""The report of the simulation: a row for each number of workers, and the smallest number that suffices."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from infra.sizing.queue_model import Request, Run, replay
from infra.sizing.service_times import ServiceTimes

TARGET_QUANTILE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The results for a number of workers. Waits are seconds from arrival to a worker; ``utilisation`` is 0 to 1."""

    workers: int
    mean_wait_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    longest_wait_s: float
    longest_queue: int
    refused: int
    utilisation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The whole report; ``--json`` prints it. ``enough``: the smallest number of workers that suffices, or None."""

    requests: int
    lasted_h: float
    an_hour: float
    service_s: float
    rests_on: str
    in_hand: int
    queue_limit: int
    target_s: float
    enough: int | None
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it for ``json.dumps``."""
        return asdict(self)


def requests_of(arrivals: Sequence[float], times: ServiceTimes, seed: int) -> list[Request]:
    """Return requests with these arrivals (seconds, ascending) and random service times from ``seed``."""
    sample = times.draw(len(arrivals), seed)
    return [Request(at, seconds) for at, seconds in zip(arrivals, sample, strict=True)]


def simulate(
    requests: Sequence[Request], times: ServiceTimes, workers: Iterable[int], *, queue_limit: int, target_s: float
) -> Report:
    """Run the same requests through each number of workers.

    Args:
        requests: ordered by arrival.
        times: the origin of their service times, and the concurrent jobs per worker.
        workers: the numbers to try.
        queue_limit: most waiting messages.
        target_s: the wait in seconds that 95% of accepted requests must not exceed; none must be refused.
    """
    rows = tuple(_row(number, replay(requests, number * times.in_hand, queue_limit)) for number in sorted(set(workers)))
    lasted_s = requests[-1].at_s - requests[0].at_s if requests else 0.0
    return Report(
        requests=len(requests),
        lasted_h=lasted_s / 3600,
        an_hour=len(requests) / (lasted_s / 3600) if lasted_s else 0.0,
        service_s=sum(request.service_s for request in requests) / len(requests) if requests else 0.0,
        rests_on=times.rests_on,
        in_hand=times.in_hand,
        queue_limit=queue_limit,
        target_s=target_s,
        enough=next((row.workers for row in rows if not row.refused and row.p95_s <= target_s), None),
        rows=rows,
    )


def lines(report: Report) -> Iterator[str]:
    """Yield the lines of the report."""
    yield (
        f"{report.requests} requests in {report.lasted_h:.2f} h ({report.an_hour:.1f} per hour); "
        f"mean job time {report.service_s:.1f} s ({report.rests_on}); queue limit {report.queue_limit}"
    )
    yield ""
    yield "workers     p50     p90     p95     p99  longest   queue  refused  busy"
    for row in report.rows:
        waits = (row.p50_s, row.p90_s, row.p95_s, row.p99_s)
        yield (
            f"{row.workers:7} {' '.join(f'{_time(wait):>7}' for wait in waits)}  {_time(row.longest_wait_s):>7} "
            f"{row.longest_queue:7} {row.refused:8} {row.utilisation:5.0%}"
        )
    yield ""
    target = f"95% of requests wait at most {_time(report.target_s)}, and none is refused"
    if report.enough is None:
        yield f"None of these suffices ({target}). Try more workers."
    else:
        yield f"Enough: {report.enough} ({target})."


def _row(workers: int, run: Run) -> Row:
    return Row(
        workers=workers,
        mean_wait_s=run.mean_wait_s,
        p50_s=run.wait_s(0.5),
        p90_s=run.wait_s(0.9),
        p95_s=run.wait_s(TARGET_QUANTILE),
        p99_s=run.wait_s(0.99),
        longest_wait_s=run.wait_s(1),
        longest_queue=run.longest_queue,
        refused=run.refused,
        utilisation=run.utilisation,
    )


def _time(seconds: float) -> str:
    if seconds < 120:  # noqa: PLR2004 - beyond two minutes, seconds are noise
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} m" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
