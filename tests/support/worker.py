# SPDX-License-Identifier: Apache-2.0
"""A real worker in a process of its own, as an operator runs it."""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra.local.ports import PortClaim
from infra.local.process import Process, tail

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "consumer"]
READY_S = 120.0


def clean_environment(variables: dict[str, str]) -> dict[str, str]:
    """This process's environment without settings that somebody left in it, and with ``variables``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ACESTEP_")}
    return inherited | variables


class WorkerProcess:
    """``acestep-consumer run`` with these settings; entering waits until it is ready."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self._claim = PortClaim(1)
        self.log = folder / "worker.log"
        self._environment = clean_environment(
            {"ACESTEP_HTTP_PORT": str(self._claim.ports[0]), "ACESTEP_SCRATCH_DIR": str(folder), **variables}
        )
        self._process: Process | None = None

    def __enter__(self) -> Self:
        self._process = Process([*COMMAND, "run"], env=self._environment, folder=ROOT, log=self.log, guarded=True)
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while self.get("/readyz")[0] != 200:
            assert self.process.running(), tail(self.log)
            assert time.monotonic() < deadline, tail(self.log)
            time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.end(30)
        self._claim.release()

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of one of the worker's pages; status 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._claim.ports[0]}{path}", timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except OSError:
            return 0, None

    def log_lines(self, **fields: object) -> list[dict[str, Any]]:
        """The log's lines that have these fields."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if fields.items() <= line.items()]

    def children(self) -> list[int]:
        """Process ids of the worker's engine processes."""
        pid = self.process.id.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
