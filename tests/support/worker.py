# SPDX-License-Identifier: Apache-2.0
"""A real worker in a process of its own, as an operator runs it."""

import asyncio
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from infra.local.ports import PortClaim
from infra.local.process import Process, tail
from tests.support.fork_server import is_fork_server
from tests.support.waiting import WITHIN_S

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "acestep_consumer"]
LIGHT_COMMAND = [sys.executable, "-m", "tests.support.light_worker"]
LIGHT_VARIABLES = {"ACESTEP_INIT_LLM": "false"}


def clean_environment(variables: dict[str, str]) -> dict[str, str]:
    """This process's environment without settings that somebody left in it, and with ``variables``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ACESTEP_")}
    return inherited | variables


class WorkerProcess:
    """``acestep-consumer run`` with these settings; entering waits until it is ready.

    ``light``: its renderer process has no model (``tests.support.light_engine``). ``arguments`` follow ``run``, and
    ``home`` is where it runs, for its ``.env``. ``await_ready=False``: entering does not wait.
    """

    def __init__(
        self,
        folder: Path,
        variables: dict[str, str],
        *,
        light: bool = False,
        arguments: Sequence[str] = (),
        home: Path = ROOT,
        await_ready: bool = True,
    ) -> None:
        self._claim = PortClaim(1)
        self._command = [*(LIGHT_COMMAND if light else COMMAND), "run", *arguments]
        self._home = home
        self._await_ready = await_ready
        self.log = folder / "worker.log"
        ours = {
            "ACESTEP_HTTP_PORT": str(self._claim.ports[0]),
            "ACESTEP_SCRATCH_DIR": str(folder),
            "ACESTEP_ENCODERS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._environment = clean_environment(ours | (LIGHT_VARIABLES if light else {}) | variables)
        self._process: Process | None = None

    def __enter__(self) -> Self:
        self._process = Process(self._command, env=self._environment, folder=self._home, log=self.log, guarded=True)
        try:
            if self._await_ready:
                self._wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + WITHIN_S
        while self.get("/readyz")[0] != 200:
            assert self.process.running(), tail(self.log)
            assert time.monotonic() < deadline, tail(self.log)
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
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

    def kill(self) -> None:
        """SIGKILL to the worker alone: what becomes of its engines is its own to have arranged."""
        os.kill(self.process.id.pid, signal.SIGKILL)
        while self.process.running():
            time.sleep(0.01)
        self.process.end()  # reaps its guard; its group is left alone

    def children(self) -> list[int]:
        """Process ids of the worker's engine processes."""
        pid = self.process.id.pid
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in children if not is_fork_server(child)]


@asynccontextmanager
async def running(worker: WorkerProcess) -> AsyncIterator[WorkerProcess]:
    """Start and end a worker without holding up the event loop: it may be what serves the worker's proxies."""
    await asyncio.to_thread(worker.__enter__)
    try:
        yield worker
    finally:
        await asyncio.to_thread(worker.__exit__, None, None, None)
