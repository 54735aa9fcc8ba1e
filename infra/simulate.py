# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m infra.simulate``: arguments become arrivals, services and an answer."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from infra.sizing.answer import lines, requests_of, simulate
from infra.sizing.arrivals import TraceUnreadableError, bursty, denser, poisson, read_trace
from infra.sizing.services import Services, constant, read_measured, read_plan

_ABOUT = """\
How many workers does this traffic need? Replays when requests came against how long jobs take, with the queue's limit,
and prints waits, refusals and utilisation for each number of workers (GPUs).
"""

_EXAMPLES = """\
examples
  Yesterday's traffic, half as much again, on what the workers measured with 8 jobs in hand:
    acestep-consumer watch --json > events.jsonl
    python -m infra.simulate events.jsonl --times 1.5 --measured events.jsonl --in-hand 8 --workers 1..6
  Traffic that you expect, on a card that you do not have yet:
    acestep-consumer plan --vram 48 --card "NVIDIA L40S" --json > plan.json
    python -m infra.simulate --an-hour 300 --hours 12 --peak 4 --plan plan.json --workers 1..8 --target 60

TRACE is CSV, an arrival a line, in seconds or as ISO 8601 (with a header: the column `at`, `time` or `timestamp`), or
events, of which the `completed` ones count: requests that failed or were refused are not in them.

what it leaves out: priorities (all are served in the order of arrival), producers that try again after a refusal,
starts and losses of workers. A worker is as many places as it has jobs in hand, and a job takes one for as long as was
measured: with fewer in hand it would be faster, so that waits at low load are rather less than said.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 when an argument or a file is not what it should be."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        services = _services(chosen)
        requests = requests_of(_arrivals(chosen), services, chosen.seed)
        answer = simulate(requests, services, chosen.workers, queue_limit=chosen.queue_limit, target_s=chosen.target)
    except (TraceUnreadableError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(answer.as_json(), indent=2) if chosen.json else "\n".join(lines(answer)))
    return 0


def workers_of(text: str) -> list[int]:
    """Read ``1..8``, ``2,4`` or ``3``. Raises argparse's error for anything else."""
    first, dots, last = text.partition("..")
    try:
        numbers = list(range(int(first), int(last) + 1)) if dots else [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workers; 4, 2,4 and 1..8 are")
    return numbers


def _arrivals(chosen: argparse.Namespace) -> list[float]:
    if (chosen.trace is None) == (chosen.an_hour is None):
        raise ValueError("name a file of arrivals, or make them up with --an-hour; one of the two")
    if chosen.trace is not None:
        times = read_trace(chosen.trace)
    elif chosen.peak is not None:
        times = bursty(chosen.an_hour, chosen.hours, chosen.peak, chosen.seed)
    else:
        times = poisson(chosen.an_hour, chosen.hours, chosen.seed)
    return denser(times, chosen.times)


def _services(chosen: argparse.Namespace) -> Services:
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
    when = parser.add_argument_group("when requests come")
    when.add_argument("trace", nargs="?", type=Path, help="file of arrivals: CSV or events")
    when.add_argument("--an-hour", type=_positive, help="make up so many an hour, independent of each other")
    when.add_argument("--hours", type=_positive, default=8.0, help="for so many hours (default: 8)")
    when.add_argument(
        "--peak", type=_positive, help="in bursts of about two minutes with so many times the mean, 1 to 6"
    )
    when.add_argument("--times", type=_positive, default=1.0, help="so many times this traffic (default: 1)")
    takes = parser.add_argument_group("how long jobs take").add_mutually_exclusive_group(required=True)
    takes.add_argument(
        "--measured", type=Path, help="seconds, `completed` events or manifests, one a line; or a folder"
    )
    takes.add_argument("--plan", type=Path, help="answer of `acestep-consumer plan --json`; it sets --in-hand too")
    takes.add_argument("--takes", type=_positive, metavar="SECONDS", help="the same for every job")
    machine = parser.add_argument_group("what serves them")
    machine.add_argument(
        "--workers", type=workers_of, default=workers_of("1..8"), help="1..8, 2,4 or 3 (default: 1..8)"
    )
    machine.add_argument("--in-hand", type=_count, default=1, help="jobs in one worker's hands (default: 1)")
    machine.add_argument("--queue-limit", type=_count, default=200, help="ACESTEP_QUEUE_MAXSIZE (default: 200)")
    parser.add_argument("--target", type=_positive, default=60.0, help="wait for 95 of 100, seconds (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn at random (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
