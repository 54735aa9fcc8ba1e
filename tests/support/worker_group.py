# SPDX-License-Identifier: Apache-2.0
"""A real group of workers in a process of its own, with placements and a worker command that a test chooses.

Run as ``python -m tests.support.worker_group OPTIONS``, JSON with ``command``, ``placements``, ``labelled`` and
``steady_s``.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from acestep_consumer.config.logs import set_up_logs
from acestep_consumer.multi_gpu.parent import STEADY_S, WorkerGroup
from acestep_consumer.multi_gpu.placement import Placement
from infra.local.process import Process, ProcessId
from tests.support.worker import ROOT, clean_environment


class WorkerGroupProcess:
    """The parent process. ``placements``: what each worker's environment has beyond ``variables``."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        placements: Mapping[str, Mapping[str, str]],
        variables: Mapping[str, str],
        *,
        labelled: bool = False,
        steady_s: float = STEADY_S,
    ) -> None:
        self.log = folder / "parent.log"
        options = {"command": command, "placements": placements, "labelled": labelled, "steady_s": steady_s}
        self._options = json.dumps(options)
        self._environment = clean_environment({"PYTHONUNBUFFERED": "1", **variables})
        self._process: Process | None = None

    def __enter__(self) -> Self:
        argv = [sys.executable, "-m", "tests.support.worker_group", self._options]
        self._process = Process(argv, env=self._environment, folder=ROOT, log=self.log, guarded=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.end(30)

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    def log_lines(self, **fields: object) -> list[dict[str, Any]]:
        """The log's lines that have these fields."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if fields.items() <= line.items()]

    def worker(self, gpu: str) -> ProcessId:
        """The worker that was started last for this GPU."""
        return ProcessId.of(self.log_lines(event="worker started", gpu=gpu)[-1]["pid"])


def main() -> int:
    options = json.loads(sys.argv[1])
    set_up_logs("info", "json")
    placements = [Placement(name, environment) for name, environment in options.pop("placements").items()]
    return asyncio.run(WorkerGroup(placements, options.pop("command"), os.environ, **options).run())


if __name__ == "__main__":
    sys.exit(main())
