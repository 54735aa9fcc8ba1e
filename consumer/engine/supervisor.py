# SPDX-License-Identifier: Apache-2.0
"""Keeps one renderer process alive and gives each job its own answer.

A job is an order with a future. When the process dies, its orders fail with ``EngineCrashed`` and are tried again on
the next process, up to the attempt limit; deliveries stay in hand meanwhile.
"""

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from consumer.engine.messages import (
    Broken,
    Configure,
    FromEngine,
    Loading,
    Progressed,
    Ready,
    Render,
    Rendered,
    RendererReport,
    Stop,
    Unusable,
)
from consumer.engine.process import EngineProcess
from consumer.errors import ConsumerError, EngineCrashed, Interrupted, error_of_code
from consumer.job import Job, Plan, Rendering, Sources
from consumer.ports import Report

RENDERER = "consumer.engine.renderer"
FIRST_RESTART_S, LAST_RESTART_S = 0.5, 30.0
MAX_FAILED_STARTS = 3

log = structlog.get_logger()


class EngineUnusable(Exception):
    """The engine cannot start with these settings; the text says what to change."""


@dataclass(slots=True)
class _Order:
    answer: asyncio.Future[Rendering]
    report: Report


class RendererSupervisor:
    """Implements the ``Renderer`` port on a child process."""

    def __init__(self, configure: Configure, *, max_attempts: int, module: str = RENDERER) -> None:
        self._configure = configure
        self._max_attempts = max_attempts
        self._module = module
        self._numbers = itertools.count(1)
        self._orders: dict[int, _Order] = {}
        self._first: asyncio.Future[RendererReport] = asyncio.get_running_loop().create_future()
        self._ready = asyncio.Event()
        self._process: EngineProcess | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self.report: RendererReport | None = None
        self.restarts = 0

    @property
    def ready(self) -> bool:
        """Whether a process is up with its models loaded."""
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return self._process.pid if self._process else None

    async def start(self) -> RendererReport:
        """Start the process and wait until its models are loaded. Raises ``EngineUnusable``."""
        self._keeper = asyncio.create_task(self._keep(), name="renderer supervisor")
        await asyncio.wait((self._keeper, self._first), return_when=asyncio.FIRST_COMPLETED)
        if self._keeper.done():
            self._keeper.result()
        return self._first.result()

    async def wait_unusable(self) -> None:
        """Wait until the engine gives up for good. Raises ``EngineUnusable`` then."""
        if self._keeper is not None:
            await asyncio.shield(self._keeper)

    async def stop(self) -> None:
        """End the process; orders still open are interrupted."""
        self._stopping.set()
        if self._process is not None:
            self._process.close()
        if self._keeper is not None:
            with suppress(EngineUnusable):
                await self._keeper

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Render one job, again on a new process if the old one dies under it."""
        for attempt in range(1, self._max_attempts + 1):
            try:
                return await self._order(job, plan, sources, folder, report)
            except EngineCrashed as error:
                log.warning("renderer died under a job", task_id=job.task_id, attempt=attempt, reason=str(error))
        raise EngineCrashed(f"the renderer process died {self._max_attempts} times with this job inside")

    async def _order(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        await self._ready.wait()
        number, order = next(self._numbers), _Order(asyncio.get_running_loop().create_future(), report)
        self._orders[number] = order
        try:
            self._send(Render(order=number, job=job, plan=plan, sources=sources, folder=folder))
            return await order.answer
        except asyncio.CancelledError:
            self._send(Stop(order=number))
            raise
        finally:
            self._orders.pop(number, None)

    def _send(self, message: Render | Stop) -> None:
        if self._process is not None:
            self._process.send(message)

    async def _keep(self) -> None:
        """Run one process after the other, until stopped or until one says that it is no use."""
        failures = 0
        while True:
            failures = 0 if await self._run_one() else failures + 1
            if self._stopping.is_set():
                return
            if failures == MAX_FAILED_STARTS and self.report is None:
                raise EngineUnusable(f"the renderer process died {failures} times while loading; its log is above")
            self.restarts += 1
            pause = min(FIRST_RESTART_S * 2**failures, LAST_RESTART_S)
            log.warning("renderer restarts", in_s=pause)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _run_one(self) -> bool:
        """Run one process to its end; tell whether it had become ready."""
        self._process = process = await EngineProcess.start(self._module)
        if self._stopping.is_set():
            process.close()
        was_ready = False
        try:
            process.send(self._configure)
            async for message in process.messages():
                self._take(message)
                was_ready = was_ready or self._ready.is_set()
        finally:
            self._ready.clear()
            self._process = None
            self._fail_all(await process.end())
        return was_ready

    def _take(self, message: FromEngine) -> None:
        match message:
            case Loading(what=what):
                log.info("renderer loading", what=what)
            case Ready(report=report):
                self._welcome(report)
            case Unusable(reason=reason):
                raise EngineUnusable(reason)
            case Progressed(order=number, fraction=fraction, stage=stage):
                if number in self._orders:
                    self._orders[number].report(fraction, stage)
            case Rendered(order=number, rendering=rendering):
                self._answer(number, lambda answer: answer.set_result(rendering))
            case Broken(order=number, code=code, reason=reason):
                self._answer(number, lambda answer: answer.set_exception(error_of_code(code, reason)))

    def _welcome(self, report: RendererReport) -> None:
        self.report = report
        self._ready.set()
        if not self._first.done():
            self._first.set_result(report)

    def _answer(self, number: int, give: Callable[["asyncio.Future[Rendering]"], None]) -> None:
        order = self._orders.get(number)
        if order is not None and not order.answer.done():
            give(order.answer)

    def _fail_all(self, exit_code: int) -> None:
        if not self._stopping.is_set():
            log.error("renderer process gone", exit_code=exit_code)
        for number in list(self._orders):
            self._answer(number, lambda answer: answer.set_exception(self._loss(exit_code)))

    def _loss(self, exit_code: int) -> ConsumerError:
        if self._stopping.is_set():
            return Interrupted("the worker stops")
        return EngineCrashed(f"the renderer process ended with exit code {exit_code}")
