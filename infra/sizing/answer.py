# SPDX-License-Identifier: Apache-2.0
"""What the simulation answers: a row for each number of workers, and the smallest number that is enough."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from infra.sizing.line import Request, Run, replay
from infra.sizing.services import Services

SHARE_THAT_COUNTS = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of workers. Waits in seconds from arrival to a worker's hands; ``utilisation`` is 0 to 1."""

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
class Answer:
    """The whole answer; ``--json`` prints it. ``enough`` is None when no number of workers was."""

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
        """Return it as what ``json.dumps`` takes."""
        return asdict(self)


def requests_of(arrivals: Sequence[float], services: Services, seed: int) -> list[Request]:
    """Return requests at these times (seconds, ascending); ``seed`` is that of the draw of what they take."""
    takes = services.draw(len(arrivals), seed)
    return [Request(at, seconds) for at, seconds in zip(arrivals, takes, strict=True)]


def simulate(
    requests: Sequence[Request], services: Services, workers: Iterable[int], *, queue_limit: int, target_s: float
) -> Answer:
    """Send the same requests through each number of workers.

    Args:
        requests: in the order of their arrival; all numbers of workers get the same.
        services: where their times come from, and how many a worker has in hand.
        workers: the numbers to try.
        queue_limit: messages that may wait.
        target_s: wait that 95 of 100 accepted requests shall not exceed, seconds; nobody shall be refused.
    """
    rows = tuple(
        _row(number, replay(requests, number * services.in_hand, queue_limit)) for number in sorted(set(workers))
    )
    lasted_s = requests[-1].at_s - requests[0].at_s if requests else 0.0
    return Answer(
        requests=len(requests),
        lasted_h=lasted_s / 3600,
        an_hour=len(requests) / (lasted_s / 3600) if lasted_s else 0.0,
        service_s=sum(request.takes_s for request in requests) / len(requests) if requests else 0.0,
        rests_on=services.rests_on,
        in_hand=services.in_hand,
        queue_limit=queue_limit,
        target_s=target_s,
        enough=next((row.workers for row in rows if not row.refused and row.p95_s <= target_s), None),
        rows=rows,
    )


def lines(answer: Answer) -> Iterator[str]:
    """Return the answer for a person, a line at a time."""
    yield (
        f"{answer.requests} requests in {answer.lasted_h:.2f} h ({answer.an_hour:.1f} an hour); "
        f"a job takes {answer.service_s:.1f} s on average ({answer.rests_on}); queue limit {answer.queue_limit}"
    )
    yield ""
    yield "workers     p50     p90     p95     p99  longest   queue  refused  busy"
    for row in answer.rows:
        waits = (row.p50_s, row.p90_s, row.p95_s, row.p99_s)
        yield (
            f"{row.workers:7} {' '.join(f'{_time(wait):>7}' for wait in waits)}  {_time(row.longest_wait_s):>7} "
            f"{row.longest_queue:7} {row.refused:8} {row.utilisation:5.0%}"
        )
    yield ""
    wanted = f"95 of 100 requests wait at most {_time(answer.target_s)} and nobody is refused"
    if answer.enough is None:
        yield f"None of these is enough: {wanted} with none of them. Try more workers."
    else:
        yield f"Enough: {answer.enough} ({wanted})."


def _row(workers: int, run: Run) -> Row:
    return Row(
        workers=workers,
        mean_wait_s=run.mean_wait_s,
        p50_s=run.wait_s(0.5),
        p90_s=run.wait_s(0.9),
        p95_s=run.wait_s(SHARE_THAT_COUNTS),
        p99_s=run.wait_s(0.99),
        longest_wait_s=run.wait_s(1),
        longest_queue=run.longest_queue,
        refused=run.refused,
        utilisation=run.utilisation,
    )


def _time(seconds: float) -> str:
    if seconds < 120:  # noqa: PLR2004 - two minutes: from there on seconds are noise
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} m" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
