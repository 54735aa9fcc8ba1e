# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m infra.simulate``: estimates the number of workers that a traffic needs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from infra.sizing.arrivals import TraceUnreadableError, bursty, denser, poisson, read_trace
from infra.sizing.report import lines, requests_of, simulate
from infra.sizing.service_times import ServiceTimes, constant, read_measured, read_plan

_ABOUT = """\
How many workers does this traffic need? Simulates arrivals, job times and the queue limit, and prints waits, refused
requests and utilisation for each number of workers (GPUs).
"""

_EXAMPLES = """\
examples
  Yesterday's traffic plus 50%, with job times measured at 8 concurrent jobs per worker:
    acestep-consumer watch --json > events.jsonl
    python -m infra.simulate events.jsonl --times 1.5 --measured events.jsonl --in-hand 8 --workers 1..6
  Expected traffic, on a GPU that you do not have yet:
    acestep-consumer plan --vram 48 --card "NVIDIA L40S" --json > plan.json
    python -m infra.simulate --an-hour 300 --hours 12 --peak 4 --plan plan.json --workers 1..8 --target 60

TRACE is CSV, one arrival per line, in seconds or ISO 8601 (with a header: the column `at`, `time` or `timestamp`), or
events, of which only `completed` ones count: failed and refused requests are not included.

Not simulated: priorities (all requests are served in order of arrival), producers that retry after a refusal, starts
and failures of workers. Job times do not depend on the load: with fewer concurrent jobs they would be shorter, so real
waits at low load are shorter too.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 if an argument or a file is invalid."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        times = _service_times(chosen)
        requests = requests_of(_arrivals(chosen), times, chosen.seed)
        report = simulate(requests, times, chosen.workers, queue_limit=chosen.queue_limit, target_s=chosen.target)
    except (TraceUnreadableError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.as_json(), indent=2) if chosen.json else "\n".join(lines(report)))
    return 0


def workers_of(text: str) -> list[int]:
    """Parse ``1..8``, ``2,4`` or ``3``. Raises argparse's error for anything else."""
    first, dots, last = text.partition("..")
    try:
        numbers = list(range(int(first), int(last) + 1)) if dots else [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers, such as 4, 2,4 or 1..8")
    return numbers


def _arrivals(chosen: argparse.Namespace) -> list[float]:
    if (chosen.trace is None) == (chosen.an_hour is None):
        raise ValueError("give either a file of arrivals or --an-hour")
    if chosen.trace is not None:
        times = read_trace(chosen.trace)
    elif chosen.peak is not None:
        times = bursty(chosen.an_hour, chosen.hours, chosen.peak, chosen.seed)
    else:
        times = poisson(chosen.an_hour, chosen.hours, chosen.seed)
    return denser(times, chosen.times)


def _service_times(chosen: argparse.Namespace) -> ServiceTimes:
    if chosen.plan is not None:
        return read_plan(chosen.plan)
    if chosen.measured is not None:
        return read_measured(chosen.measured, chosen.in_hand)
    return constant(chosen.takes, chosen.in_hand)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infra.simulate",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    when = parser.add_argument_group("arrivals")
    when.add_argument("trace", nargs="?", type=Path, help="file of arrivals: CSV or events")
    when.add_argument("--an-hour", type=_positive, help="random arrivals, this many per hour")
    when.add_argument("--hours", type=_positive, default=8.0, help="duration of random arrivals (default: 8)")
    when.add_argument(
        "--peak", type=_positive, help="bursts of about two minutes with this many times the mean, 1 to 6"
    )
    when.add_argument("--times", type=_positive, default=1.0, help="multiply the traffic (default: 1)")
    takes = parser.add_argument_group("job times").add_mutually_exclusive_group(required=True)
    takes.add_argument(
        "--measured", type=Path, help="seconds, `completed` events or manifests, one per line; or a folder of manifests"
    )
    takes.add_argument("--plan", type=Path, help="output of `acestep-consumer plan --json`; sets --in-hand as well")
    takes.add_argument("--takes", type=_positive, metavar="SECONDS", help="the same for every job")
    machine = parser.add_argument_group("workers")
    machine.add_argument(
        "--workers", type=workers_of, default=workers_of("1..8"), help="1..8, 2,4 or 3 (default: 1..8)"
    )
    machine.add_argument("--in-hand", type=_count, default=1, help="concurrent jobs per worker (default: 1)")
    machine.add_argument("--queue-limit", type=_count, default=200, help="ACESTEP_QUEUE_MAXSIZE (default: 200)")
    parser.add_argument(
        "--target", type=_positive, default=60.0, help="longest wait of 95%% of requests, seconds (default: 60)"
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
