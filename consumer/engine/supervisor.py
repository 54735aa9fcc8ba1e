# SPDX-License-Identifier: Apache-2.0
"""Keeps one engine process alive and gives each job its own answer.

A job is an order with a future. When the process dies, its orders fail with ``EngineCrashed`` and are tried again on
the next process, up to the attempt limit; deliveries stay in hand meanwhile.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import structlog

from consumer.engine.messages import (
    Broken,
    Done,
    FromEngine,
    Loading,
    Progressed,
    Ready,
    Stop,
    ToEngine,
    Unusable,
    Vitals,
)
from consumer.engine.process import EngineProcess
from consumer.engine.usage import Usage
from consumer.errors import ConsumerError, EngineCrashed, Interrupted, error_of_code
from consumer.ports import Report

ReportT = TypeVar("ReportT")
AnswerT = TypeVar("AnswerT")

FIRST_RESTART_S, LAST_RESTART_S = 0.5, 30.0
MAX_FAILED_STARTS = 3

log = structlog.get_logger()


class EngineUnusable(Exception):
    """The engine cannot start with these settings; the text says what to change."""


@dataclass(slots=True)
class _Order:
    answer: "asyncio.Future[object]"
    report: Report


class Supervisor(Generic[ReportT]):
    """An engine process and its successors. A subclass says which: what people call it, what Python runs, what it says.

    Args:
        configure: the first message to each process.
        max_attempts: processes that one order may see die before it fails.
        module: another program that speaks the same messages.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    report_type: type[ReportT]

    def __init__(self, configure: ToEngine, *, max_attempts: int, module: str | None = None) -> None:
        self._module = module or self.module
        self._configure = configure
        self._max_attempts = max_attempts
        self._numbers = itertools.count(1)
        self._orders: dict[int, _Order] = {}
        self._first: asyncio.Future[ReportT] = asyncio.get_running_loop().create_future()
        self._ready = asyncio.Event()
        self._process: EngineProcess | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self.usage = Usage()
        self.report: ReportT | None = None
        self.restarts = 0

    @property
    def ready(self) -> bool:
        """Whether a process is up with its models loaded."""
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return self._process.pid if self._process else None

    @property
    def vitals(self) -> Vitals | None:
        """What the process last said about its device; None until it says so, and again when it is replaced."""
        return self.usage.vitals

    async def start(self) -> ReportT:
        """Start the process and wait until its models are loaded. Raises ``EngineUnusable``."""
        self._keeper = asyncio.create_task(self._keep(), name=f"{self.name} supervisor")
        await asyncio.wait((self._keeper, self._first), return_when=asyncio.FIRST_COMPLETED)
        if self._keeper.done():
            self._keeper.result()
            raise EngineUnusable(f"the {self.name} was stopped while it was loading")
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

    async def ask(
        self, task_id: str, order: Callable[[int], ToEngine], answer: type[AnswerT], report: Report
    ) -> AnswerT:
        """Have one order done, again on a new process if the old one dies under it.

        ``order`` makes the message from its number, ``answer`` is what comes back. Cancelling the call stops the work
        at its next step.
        """
        for attempt in range(1, self._max_attempts + 1):
            try:
                result = await self._ask_once(order, report)
            except EngineCrashed as error:
                log.warning(
                    "engine died under a job", engine=self.name, task_id=task_id, attempt=attempt, reason=str(error)
                )
            else:
                assert isinstance(result, answer), f"{self.name} answered with {type(result).__name__}"  # noqa: S101 - narrows the type
                return result
        raise EngineCrashed(f"the {self.name} process died {self._max_attempts} times with this job inside")

    async def _ask_once(self, order: Callable[[int], ToEngine], report: Report) -> object:
        await self._ready.wait()
        number = next(self._numbers)
        entry = self._orders[number] = _Order(asyncio.get_running_loop().create_future(), report)
        try:
            self._send(order(number))
            return await entry.answer
        except asyncio.CancelledError:
            self._send(Stop(order=number))
            raise
        finally:
            self._orders.pop(number, None)

    def _send(self, message: ToEngine) -> None:
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
                raise EngineUnusable(f"the {self.name} process died {failures} times while loading; its log is above")
            self.restarts += 1
            pause = min(FIRST_RESTART_S * 2**failures, LAST_RESTART_S)
            log.warning("engine restarts", engine=self.name, in_s=pause)
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
            self.usage.process_gone()
            self._fail_all(await process.end())
        return was_ready

    def _take(self, message: FromEngine) -> None:
        match message:
            case Loading(what=what):
                log.info("engine loading", engine=self.name, what=what)
            case Ready(report=report) if isinstance(report, self.report_type):
                self._welcome(report)
            case Unusable(reason=reason):
                raise EngineUnusable(reason)
            case Progressed(order=number, fraction=fraction, stage=stage):
                if number in self._orders:
                    self._orders[number].report(fraction, stage)
            case Done(order=number, result=result):
                self._answer(number, lambda answer: answer.set_result(result))
            case Broken(order=number, code=code, reason=reason):
                self._answer(number, lambda answer: answer.set_exception(error_of_code(code, reason)))
            case Vitals():
                self.usage.note(message, time.monotonic())
            case _:
                log.error("engine said something that is not its part", engine=self.name, kind=message.kind)

    def _welcome(self, report: ReportT) -> None:
        self.report = report
        self.usage.process_ready(time.monotonic())
        self._ready.set()
        if not self._first.done():
            self._first.set_result(report)

    def _answer(self, number: int, give: Callable[["asyncio.Future[object]"], None]) -> None:
        order = self._orders.get(number)
        if order is not None and not order.answer.done():
            give(order.answer)

    def _fail_all(self, exit_code: int) -> None:
        if not self._stopping.is_set():
            log.error("engine process gone", engine=self.name, exit_code=exit_code)
        for number in list(self._orders):
            self._answer(number, lambda answer: answer.set_exception(self._loss(exit_code)))

    def _loss(self, exit_code: int) -> ConsumerError:
        if self._stopping.is_set():
            return Interrupted("the worker stops")
        return EngineCrashed(f"the {self.name} process ended with exit code {exit_code}")
