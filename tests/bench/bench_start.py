# SPDX-License-Identifier: Apache-2.0
"""What the consumer process weighs when idle, and how soon it stands: the real `acestep-consumer run`.

The worker is started as an operator starts it, with the tiny checkpoint. Start-to-ready is from the process's birth
to its line `broker and storage ready`: that is all but the models, which load in a process of their own meanwhile.
Memory is read from /proc, of the consumer process alone, some seconds after /readyz: resident (RSS) and proportional
(PSS, where a shared page counts by its share).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, Self

from infra.local.ports import LOOPBACK, PortClaim

START_GOAL_S = 2.0
MEMORY_GOAL_MB = 120.0

_READY_TIMEOUT_S = 180.0
_END_TIMEOUT_S = 30.0
_POLL_S = 0.1
_KB = 1024
_MB = 1e6


class BenchError(Exception):
    """The worker did not do what is to be measured; the text says what it did."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start. Seconds from the process's birth; megabytes (10^6 bytes) when idle."""

    connected_s: float
    ready_s: float
    rss_mb: float
    pss_mb: float


class Worker:
    """A running worker whose log is read as it comes. A context manager; leaving ends it."""

    def __init__(self, variables: dict[str, str], port: int) -> None:
        self._url = f"http://{LOOPBACK}:{port}/readyz"
        self._lines: list[str] = []
        self._seen: dict[str, float] = {}
        self._born = time.perf_counter()
        command = Path(sys.executable).with_name("acestep-consumer")
        self._process = subprocess.Popen(
            [str(command), "run"], env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def measure(self, idle_s: float) -> Start:
        """Wait until it is ready and idle, then weigh it."""
        while not self._ready():
            if self._process.poll() is not None or time.perf_counter() - self._born > _READY_TIMEOUT_S:
                raise BenchError("the worker was not ready:\n" + "".join(self._lines[-20:]))
            time.sleep(_POLL_S)
        ready_s = time.perf_counter() - self._born
        time.sleep(idle_s)
        memory = _memory_mb(self._process.pid)
        return Start(self._seen["broker and storage ready"], ready_s, memory["Rss"], memory["Pss"])

    def _read(self, log: IO[str]) -> None:
        for line in log:
            self._seen.setdefault(_event_of(line), time.perf_counter() - self._born)
            self._lines.append(line)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._url, timeout=2) as answer:  # noqa: S310 - this machine's own address
                return bool(answer.status == HTTPStatus.OK)
        except (OSError, urllib.error.URLError):
            return False


def main() -> int:
    """Run the benchmark: a table on standard error, one line of JSON on standard output."""
    arguments = _parser().parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="acestep-") as folder:
            starts = _starts(Path(folder), arguments)
    except BenchError as error:
        _say(f"error: {error}")
        return 1
    rows = {name: _spread([asdict(start)[name] for start in starts]) for name in asdict(starts[0])}
    _print_table(rows)
    sys.stdout.write(json.dumps({"bench": "start", "runs": arguments.runs, "load": os.getloadavg()[0], **rows}) + "\n")
    return 0


def _starts(folder: Path, arguments: argparse.Namespace) -> list[Start]:
    command = Path(sys.executable).with_name("acestep-consumer")
    subprocess.run([str(command), "tiny-checkpoint", str(folder)], check=True, stderr=subprocess.DEVNULL)
    starts = []
    for number in range(1, arguments.runs + 1):
        claim = PortClaim(1)
        try:
            with Worker(_variables(folder, claim.ports[0]), claim.ports[0]) as worker:
                starts.append(worker.measure(arguments.idle))
        finally:
            claim.release()
        _say(f"start {number}/{arguments.runs}: {starts[-1]}")
    return starts


def _variables(checkpoints: Path, port: int) -> dict[str, str]:
    return os.environ | {
        "ACESTEP_CHECKPOINT_DIR": str(checkpoints),
        "ACESTEP_CONFIG_PATH": "acestep-v15-turbo",
        "ACESTEP_INIT_LLM": "false",
        "ACESTEP_HTTP_PORT": str(port),
        "ACESTEP_LOG_LEVEL": "info",
        "ACESTEP_LOG_FORMAT": "json",
    }


def _memory_mb(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) * _KB / _MB for name, _, value in (line.partition(":") for line in lines)}


def _event_of(line: str) -> str:
    """The message of a log line; empty when it is not one of ours."""
    try:
        entry: Any = json.loads(line)
    except ValueError:
        return ""
    return str(entry.get("event", "")) if isinstance(entry, dict) else ""


def _spread(values: list[float]) -> dict[str, float]:
    numbers = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(number, 2) for name, number in numbers.items()}


def _print_table(rows: dict[str, dict[str, float]]) -> None:
    titles = {
        "connected_s": f"start to broker and storage ready, s (goal: under {START_GOAL_S:g})",
        "ready_s": "start to /readyz with the tiny models, s",
        "rss_mb": f"consumer process idle, RSS, MB (goal: under {MEMORY_GOAL_MB:g})",
        "pss_mb": "consumer process idle, PSS, MB",
    }
    for name, title in titles.items():
        row = rows[name]
        _say(f"{title:<60} {row['median']:>8.2f}   ({row['least']:.2f} to {row['most']:.2f})")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash infra/dev bench start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="starts (5)")
    parser.add_argument("--idle", type=float, default=3, help="seconds between ready and the look at memory (3)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
