# SPDX-License-Identifier: Apache-2.0
"""One worker's place: its wires, each through a proxy, and what starts it again and again, as an orchestrator does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from infra.local.process import Process
from tests.support.faulty_s3 import FaultyS3
from tests.support.proxy import Proxy
from tests.support.worker import COMMAND, LIGHT_COMMAND, LIGHT_VARIABLES, ROOT, clean_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

_POLL_S = 0.1
_PAUSE_S = 0.5
# A worker that runs jobs when it is told to leave finishes them; a storage that hangs may keep it for a while.
_LEAVES_WITHIN_S = 120.0
# What timeout(1) says of a command that it had to end.
_STAYED = 124


class WorkerSlot:
    """A worker that is started again whenever it is gone.

    Broker and S3 are reached through ``amqp`` and ``wire``; ``front`` is an HTTP server between ``wire`` and S3.
    ``code`` is the source tree that it runs; ``light``: its renderer process has no model.
    """

    def __init__(
        self, number: int, folder: Path, environment: Mapping[str, str], *, code: Path = ROOT, light: bool = True
    ) -> None:
        self._environment = environment
        self._code = code
        self._light = light
        self._process: Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self._wires = AsyncExitStack()
        self.folder = folder / f"worker-{number + 1}"
        self.log = self.folder / "worker.log"
        self.scratch = self.folder / "scratch"
        self.amqp = Proxy.for_url(environment["ACESTEP_AMQP_URL"])
        self.front = FaultyS3(environment["ACESTEP_S3_ENDPOINT"])
        self.name = f"worker {number + 1}"
        self.worker_id = self.name.replace(" ", "-")
        self.exits: Counter[int] = Counter()
        """Exit statuses so far; negative for a signal."""
        self.starts = 0

    @property
    def up(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.running()

    async def __aenter__(self) -> Self:
        self.scratch.mkdir(parents=True)
        await self._wires.enter_async_context(self.amqp)
        await self._wires.enter_async_context(self.front)
        self.wire = await self._wires.enter_async_context(Proxy.for_url(self.front.endpoint))
        self._keeper = asyncio.create_task(self._keep(), name=self.name)
        self._wanted.set()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._keeper is not None
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        if self._process is not None:
            self._process.kill()
        await self._wires.aclose()

    def signal(self, number: signal.Signals) -> bool:
        """Send the worker, and nobody of its family, a signal. False when it is not up."""
        if not self.up or self._process is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(self._process.id.pid, number)
        return True

    def kill_engine(self) -> bool:
        """SIGKILL to its engine process. False when there is none."""
        children = self._children()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return bool(children)

    def rest(self) -> None:
        """Do not start the worker again until ``wake``."""
        self._wanted.clear()

    def wake(self) -> None:
        """Start it again when it is gone."""
        self._wanted.set()

    def heal(self) -> None:
        """Let all wires pass everything."""
        self.amqp.heal()
        self.wire.heal()

    async def leave(self) -> None:
        """Have it finish its work and leave for good; one that stays is noted among the ``exits``."""
        self.rest()
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_LEAVES_WITHIN_S):
                while self.up or self._process is not None:  # noqa: ASYNC110 - a process is polled
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            self.exits[_STAYED] += 1

    async def _keep(self) -> None:
        while True:
            await self._wanted.wait()
            began = self.log.stat().st_size if self.log.exists() else 0
            self._process = process = self._start()
            self.starts += 1
            while process.running():  # noqa: ASYNC110 - as above
                await asyncio.sleep(_POLL_S)
            self.exits[self._status(process.returncode() or 0, began)] += 1
            self._process = None
            await asyncio.to_thread(process.end)  # reaps its guard; what it left behind has to leave by itself
            await asyncio.sleep(_PAUSE_S)

    def _status(self, status: int, began: int) -> int:
        """Its exit status. SIGTERM finds no handler while Python still loads the program: that is a good end, too."""
        if status != -signal.SIGTERM:
            return status
        with self.log.open("rb") as log:
            log.seek(began)
            return status if b'"starting"' in log.read() else 0

    def _start(self) -> Process:
        variables = {
            **self._environment,
            **LIGHT_VARIABLES,
            "PYTHONPATH": ":".join(map(str, (self._code, self._code / "consumer", self._code / "schemas"))),
            "ACESTEP_AMQP_URL": self.amqp.url(self._environment["ACESTEP_AMQP_URL"]),
            "ACESTEP_S3_ENDPOINT": self.wire.url(self.front.endpoint),
            "ACESTEP_SCRATCH_DIR": str(self.scratch),
            "ACESTEP_HTTP_PORT": "0",
            "ACESTEP_WORKER_ID": self.worker_id,
            "ACESTEP_LOG_FORMAT": "json",
        }
        command = [*(LIGHT_COMMAND if self._light else COMMAND), "run"]
        return Process(command, env=clean_environment(variables), folder=self._code, log=self.log, guarded=True)

    def _children(self) -> list[int]:
        if self._process is None:
            return []
        pid = self._process.id.pid
        with suppress(OSError):
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []
