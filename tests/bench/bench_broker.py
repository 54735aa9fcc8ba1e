# SPDX-License-Identifier: Apache-2.0
"""Messages a second through the worker, side by side with a bare aio-pika consumer, FastStream and taskiq-aio-pika.

Every contender runs in a process of its own on the same servers and works off a queue that was filled before. All send
the same requests for a message (`--work same`): a look for an earlier result, a confirmed `started` event, one 64 KiB
song and then one manifest into S3, both unless one is there, a confirmed `completed` event, then the ack. The worker's
renderer is done at once; all else is the real thing, with what the others leave out: validation, policy, cancellation,
and songs that come as files and are hashed. `--work least` lets the others leave out the look, `started` and the
conditions, too: the least that stores and reports a song, and not what the worker promises.

Events go to durable queues, as a backend has them: a persistent one is on disk before it is confirmed. The clock runs
from the first delivery to the last ack. Contenders take turns, round by round, because machines are noisy: read the
ratios, not the rates. On a machine that does other work the ratios bend, too: CPU time a message is the steadier number
there.

At the end the worker is compared with itself, metrics, logs and tracing on and off (`tests/bench/overhead.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import statistics
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from acestep_consumer.config.settings import SettingsError
from tests.bench.arena import Arena, BenchError
from tests.bench.chore import LEAST, SAME, WORK_VARIABLE
from tests.bench.overhead import Overhead, Plan, overhead

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bench.throughput import Throughput

CONTENDERS = {
    "worker": "the worker",
    "bare_aio_pika": "bare aio-pika",
    "faststream_rabbit": "FastStream",
    "taskiq_rabbit": "taskiq-aio-pika",
}
_OURS, _BARE = "worker", "bare_aio_pika"
_NEEDS = {"faststream_rabbit": "faststream", "taskiq_rabbit": "taskiq_aio_pika"}
_PREFETCHES = (1, 8, 64)
_TRIAL_MESSAGES = 200
_SLOWEST = 10

Laps = dict[tuple[int, str], list["Throughput"]]

_console = Console(stderr=True, highlight=False)


def main() -> int:
    """Run the benchmark: a table on standard error, one line of JSON on standard output."""
    arguments = _parser().parse_args()
    os.environ[WORK_VARIABLE] = arguments.work
    _warn_when_crowded()
    try:
        throughputs, observed = asyncio.run(_run(arguments))
    except (BenchError, SettingsError) as error:
        _console.print(f"error: {error}", markup=False)
        return 1
    summary = summarise(throughputs)
    if summary:
        _console.print(_table(summary))
    if observed is not None:
        _console.print(observed.table())
    found = {"results": summary, "overhead": None if observed is None else observed.summary()}
    sys.stdout.write(
        json.dumps({"bench": "broker", **_machine(), "work": arguments.work, "rounds": arguments.rounds, **found})
        + "\n"
    )
    return 0


async def _run(arguments: argparse.Namespace) -> tuple[Laps, Overhead | None]:
    async with Arena() as arena:
        throughputs = await _contest(arena, arguments)
        if not arguments.pairs:
            return throughputs, None
        plan = Plan(prefetch=arguments.overhead_prefetch, pairs=arguments.pairs, traced=arguments.traced)
        return throughputs, await overhead(arena, plan, _console.print)


async def _contest(arena: Arena, arguments: argparse.Namespace) -> Laps:
    throughputs: Laps = defaultdict(list)
    if arguments.contenders:
        counts = {prefetch: await _trial(arena, prefetch, arguments.seconds) for prefetch in arguments.prefetch}
        for turn, prefetch, contender in _turns(arguments):
            limit_s = _SLOWEST * arguments.seconds + 60
            throughput = await arena.run(contender, prefetch, counts[prefetch], limit_s)
            throughputs[prefetch, contender].append(throughput)
            _console.print(
                f"round {turn + 1}/{arguments.rounds}  prefetch {prefetch:>2}  {CONTENDERS[contender]:<15} "
                f"{throughput.messages} messages in {throughput.seconds:.2f} s: {_rate(throughput):.0f}/s"
            )
    return throughputs


async def _trial(arena: Arena, prefetch: int, seconds: float) -> int:
    """How many messages make a round of ``seconds``; the servers get warm, too."""
    throughput = await arena.run(_BARE, prefetch, _TRIAL_MESSAGES, limit_s=60)
    return max(_TRIAL_MESSAGES, round(seconds * _rate(throughput)))


def _turns(arguments: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    """Each round begins with another contender, so that none is always the first or the last."""
    for turn in range(arguments.rounds):
        for prefetch in arguments.prefetch:
            shift = turn % len(arguments.contenders)
            for contender in (*arguments.contenders[shift:], *arguments.contenders[:shift]):
                yield turn, prefetch, contender


def summarise(throughputs: Laps) -> list[dict[str, Any]]:
    """Return a row for each prefetch and contender. ``ratio`` is the worker's rate over the contender's, per round."""
    return [_row(prefetch, contender, throughputs) for prefetch, contender in throughputs]


def _row(prefetch: int, contender: str, throughputs: Laps) -> dict[str, Any]:
    theirs, ours = throughputs[prefetch, contender], throughputs.get((prefetch, _OURS), [])
    ratios = [_rate(our) / _rate(their) for our, their in zip(ours, theirs, strict=False)]
    return {
        "prefetch": prefetch,
        "contender": contender,
        "messages": theirs[0].messages,
        "rate": round(statistics.median(map(_rate, theirs)), 1),
        "cpu_ms": round(
            statistics.median(1000 * throughput.cpu_seconds / throughput.messages for throughput in theirs), 2
        ),
        "ratio": _spread(ratios),
    }


def _rate(throughput: Throughput) -> float:
    return throughput.messages / throughput.seconds


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    numbers = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(number, 3) for name, number in numbers.items()}


def _table(summary: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, title="Medians over the rounds; in brackets the lowest and the highest ratio")
    for title in ("prefetch", "contender", "messages/s", "CPU ms/message", "worker is … times as fast"):
        table.add_column(title, justify="left" if title == "contender" else "right")
    for row in summary:
        ratio = row["ratio"]
        told = "" if ratio is None else f"{ratio['median']:.2f}  ({ratio['least']:.2f} to {ratio['most']:.2f})"
        ours = row["contender"] == _OURS
        cells = (str(row["prefetch"]), CONTENDERS[row["contender"]], f"{row['rate']:.0f}", f"{row['cpu_ms']:.2f}")
        table.add_row(*cells, "" if ours else told, style="bold" if ours else None)
    return table


def _warn_when_crowded() -> None:
    """Others' work on the same cores distorts the ratios, too."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if load > cores / 2:
        _console.print(f"warning: this machine is busy already: load {load:.1f} on {cores} cores")


def _machine() -> dict[str, Any]:
    load = round(os.getloadavg()[0], 1)
    return {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), "load": load}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash infra/dev bench broker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=5, help="length of one round of the bare consumer (5)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds for each contender and prefetch (5)")
    parser.add_argument("--prefetch", type=int, nargs="+", default=list(_PREFETCHES), help="(1 8 64)")
    parser.add_argument(
        "--contenders", nargs="*", choices=list(CONTENDERS), default=_installed(), help="(all that are installed)"
    )
    parser.add_argument("--work", choices=[SAME, LEAST], default=SAME, help="of the others for a message (same)")
    parser.add_argument(
        "--pairs", type=int, default=8, help="comparisons of the worker with and without telemetry; 0: none (8)"
    )
    parser.add_argument("--overhead-prefetch", type=int, default=8, help="prefetch of these comparisons (8)")
    parser.add_argument("--traced", type=float, default=1.0, help="share of the jobs that are traced in them (1)")
    return parser


def _installed() -> list[str]:
    return [name for name in CONTENDERS if name not in _NEEDS or importlib.util.find_spec(_NEEDS[name])]


if __name__ == "__main__":
    sys.exit(main())
