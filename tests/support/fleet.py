# SPDX-License-Identifier: Apache-2.0
"""A real fleet in a process of its own, at seats and with a worker command that a test chooses.

Run as ``python -m tests.support.fleet ORDER``, ORDER being JSON: ``command``, ``seats``, ``labelled`` and ``steady_s``.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from acestep_consumer.config.logs import set_up_logs
from acestep_consumer.multi_gpu.parent import STEADY_S, WorkerGroup
from acestep_consumer.multi_gpu.placement import Placement
from infra.local.process import Process, ProcessId
from tests.support.worker import ROOT, clean_environment


class FleetProcess:
    """The fleet, from entering to leaving. ``seats``: what each worker's environment has beyond ``variables``."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        seats: Mapping[str, Mapping[str, str]],
        variables: Mapping[str, str],
        *,
        labelled: bool = False,
        steady_s: float = STEADY_S,
    ) -> None:
        self.log = folder / "fleet.log"
        self._order = json.dumps({"command": command, "seats": seats, "labelled": labelled, "steady_s": steady_s})
        self._environment = clean_environment({"PYTHONUNBUFFERED": "1", **variables})
        self._process: Process | None = None

    def __enter__(self) -> Self:
        argv = [sys.executable, "-m", "tests.support.fleet", self._order]
        self._process = Process(argv, env=self._environment, folder=ROOT, log=self.log, guarded=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.end(30)

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    def log_lines(self, **fields: object) -> list[dict[str, Any]]:
        """The log's lines that have these fields."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if fields.items() <= line.items()]

    def worker(self, seat: str) -> ProcessId:
        """The worker that was started last at this seat."""
        return ProcessId.of(self.log_lines(event="worker started", seat=seat)[-1]["pid"])


def main() -> int:
    order = json.loads(sys.argv[1])
    set_up_logs("info", "json")
    seats = [Placement(name, environment) for name, environment in order["seats"].items()]
    fleet = WorkerGroup(seats, order["command"], os.environ, labelled=order["labelled"], steady_s=order["steady_s"])
    return asyncio.run(fleet.run())


if __name__ == "__main__":
    sys.exit(main())
