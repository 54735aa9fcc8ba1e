# SPDX-License-Identifier: Apache-2.0
"""Keeps one engine process alive and gives each job its own answer.

A job is an order with a future. When the process dies, crashed or killed for what ``watch`` found, its orders are done
again on the next one; deliveries stay in hand meanwhile. Who was alone inside is to blame. Of several, nobody is: each
becomes a suspect and runs alone on the next process, before anybody else does. Whoever is blamed too often fails with
``EngineCrashed``.
"""

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import structlog

from acestep_consumer.concurrency.locks import SharedLock
from acestep_consumer.domain.errors import DiskFull, EngineCrashed, Interrupted, error_of_code
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.engine.messages import (
    Done,
    EngineStats,
    FromEngine,
    Loading,
    Progressed,
    Ready,
    RequestFailed,
    ScratchFull,
    Stop,
    ToEngine,
    Unusable,
)
from acestep_consumer.engine.pending_requests import PendingRequests
from acestep_consumer.engine.process import EngineProcess
from acestep_consumer.engine.process_memory import held_bytes
from acestep_consumer.engine.watchdog import Watchdog, WatchdogLimits

ReportT = TypeVar("ReportT")
AnswerT = TypeVar("AnswerT")

FIRST_RESTART_S, LAST_RESTART_S = 0.5, 30.0
MAX_FAILED_STARTS = 3

log = structlog.get_logger()


class EngineUnusable(Exception):
    """The engine cannot start with these settings; the text says what to change."""


class ProcessLost(Exception):
    """The process died under an order; ``inside`` counts the orders that it had then."""

    def __init__(self, reason: str, inside: int) -> None:
        super().__init__(reason)
        self.inside = inside

    @property
    def blame(self) -> int:
        """1 for an order that was alone inside, else 0."""
        return 1 if self.inside == 1 else 0


@dataclass(frozen=True, slots=True)
class EngineState:
    """How an engine is, for people: whether it takes orders, and how often its process was replaced."""

    ready: bool
    restarts: int


class Supervisor(Generic[ReportT]):
    """An engine process and its successors. A subclass says which: what people call it, what Python runs, what it says.

    Args:
        configure: the first message to each process.
        max_attempts: processes that may die of one order before it fails.
        bounds: what a process may take before it is replaced.
        module: another program that speaks the same messages.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    report_type: type[ReportT]

    def __init__(
        self, configure: ToEngine, *, max_attempts: int, bounds: WatchdogLimits | None = None, module: str | None = None
    ) -> None:
        self._module = module or self.module
        self._configure = configure
        self._max_attempts = max_attempts
        self._bounds = bounds or WatchdogLimits()
        self._orders = PendingRequests()
        self._room = SharedLock()
        self._first: asyncio.Future[ReportT] = asyncio.get_running_loop().create_future()
        self._up = False
        self._over = False
        self._up_or_over = asyncio.Event()
        self._process: EngineProcess | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self.usage = DeviceUsage()
        self.report: ReportT | None = None
        self.restarts = 0

    @property
    def ready(self) -> bool:
        """Whether a process is up with its models loaded."""
        return self._up

    @property
    def state(self) -> EngineState:
        """Whether orders are welcome, and how often the process was replaced."""
        return EngineState(self._up, self.restarts)

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return self._process.pid if self._process else None

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
        self._give_up()
        if self._process is not None:
            self._process.close()
        if self._keeper is not None:
            with suppress(EngineUnusable):
                await self._keeper

    async def ask(
        self,
        task_id: str,
        order: Callable[[int], ToEngine],
        answer: type[AnswerT],
        report: Report,
        *,
        tries: int | None = None,
    ) -> AnswerT:
        """Have one order done, again on a new process if the old one dies under it.

        ``order`` makes the message from its number, ``answer`` is what comes back. Cancelling the call stops the work
        at its next step.

        Args:
            task_id: for the log.
            order: as above.
            answer: as above.
            report: hears of progress.
            tries: how often a process may die of this order before it fails, 1 or more; None: ``max_attempts``.

        Raises:
            EngineCrashed: a process died of this order ``tries`` times.
            Interrupted: the supervisor was stopped, or has given up.
        """
        tries = self._max_attempts if tries is None else tries
        try:
            result = await self._in_company(order, report)
        except ProcessLost as loss:
            self._tell_loss(task_id, loss)
            result = await self._alone(task_id, order, report, loss, tries)
        assert isinstance(result, answer), f"{self.name} answered with {type(result).__name__}"  # noqa: S101 - narrows the type
        return result

    async def _in_company(self, order: Callable[[int], ToEngine], report: Report) -> object:
        """Have an order done beside others. Raises ``ProcessLost``."""
        while True:
            await self._wait_up()
            async with self._room.shared():
                # Whoever had to wait for a place may find the process gone: then suspects go first again.
                if self._up:
                    return await self._ask_once(order, report)

    async def _alone(
        self, task_id: str, order: Callable[[int], ToEngine], report: Report, loss: ProcessLost, tries: int
    ) -> object:
        """Have a suspect's order done with nothing else inside, until it is done or has been blamed ``tries`` times."""
        blamed = loss.blame
        if blamed >= tries:
            raise self._crashed(blamed, loss)
        async with self._room.alone():
            while blamed < tries:
                # One that was stopped has left the room, but perhaps not the process.
                await self._orders.wait_none()
                await self._wait_up()
                try:
                    return await self._ask_once(order, report)
                except ProcessLost as again:
                    self._tell_loss(task_id, again)
                    loss, blamed = again, blamed + again.blame
        raise self._crashed(blamed, loss)

    def _crashed(self, blamed: int, loss: ProcessLost) -> EngineCrashed:
        times = "once" if blamed == 1 else f"{blamed} times"
        return EngineCrashed(f"the {self.name} process died {times} with this job inside; the last time {loss}")

    async def _ask_once(self, order: Callable[[int], ToEngine], report: Report) -> object:
        number, answer = self._orders.add(report, time.monotonic())
        try:
            self._send(order(number))
            found = await answer
        except asyncio.CancelledError:
            if self._orders.stop(number, time.monotonic()):
                self._send(Stop(order=number))
            raise
        if isinstance(found, Exception):
            raise found
        return found

    async def _wait_up(self) -> None:
        """Wait for a process that takes orders. Raises ``Interrupted`` when none will come."""
        while not self._up:
            if self._over:
                raise Interrupted("the worker stops")
            await self._up_or_over.wait()

    def _tell_loss(self, task_id: str, loss: ProcessLost) -> None:
        log.warning("engine died under a job", engine=self.name, task_id=task_id, inside=loss.inside, reason=str(loss))

    def _send(self, message: ToEngine) -> None:
        if self._process is not None:
            self._process.send(message)

    async def _keep(self) -> None:
        """Run one process after the other, until stopped or until one says that it is no use."""
        failures = 0
        try:
            while True:
                failures = 0 if await self._run_one() else failures + 1
                if self._stopping.is_set():
                    return
                if failures == MAX_FAILED_STARTS and self.report is None:
                    raise EngineUnusable(
                        f"the {self.name} process died {failures} times while loading; its log is above"
                    )
                self.restarts += 1
                await self._pause(failures)
        finally:
            self._give_up()

    async def _pause(self, failures: int) -> None:
        pause_s = min(FIRST_RESTART_S * 2**failures, LAST_RESTART_S)
        log.warning("engine restarts", engine=self.name, in_s=pause_s)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def _run_one(self) -> bool:
        """Run one process to its end; tell whether it had become ready."""
        try:
            process = await EngineProcess.start(self._module)
        except OSError as error:  # no memory or no process left for one more: that may pass
            log.error("engine process cannot be started", engine=self.name, reason=str(error))  # noqa: TRY400 - as it says
            return False
        self._process = process
        if self._stopping.is_set():
            process.close()
        watch = Watchdog(self._bounds, time.monotonic())
        guard = asyncio.create_task(self._guard(process, watch), name=f"{self.name} guard")
        was_ready = False
        try:
            process.send(self._configure)
            async for message in process.messages():
                watch.hear(message, time.monotonic())
                self._take(message)
                was_ready = was_ready or self._up
        finally:
            guard.cancel()
            self._down()
            self._lose(await process.end(), watch.found)
        return was_ready

    async def _guard(self, process: EngineProcess, watch: Watchdog) -> None:
        """Kill the process when it is of no more use.

        Two looks in a row must say so: what the process said while this one stood still is read in between.
        """
        bad_before = False
        while True:
            await asyncio.sleep(self._bounds.look_s)
            fault = watch.fault(self._orders, held_bytes(process.pid), time.monotonic())
            if fault and bad_before:
                watch.found = fault
                log.error("engine process is killed", engine=self.name, pid=process.pid, reason=fault)
                await process.kill()
                return
            bad_before = fault is not None

    def _down(self) -> None:
        self._up = False
        if not self._over:
            self._up_or_over.clear()
        self._process = None
        self.usage.process_gone()

    def _give_up(self) -> None:
        """No process will come any more: whoever waits for one hears of it."""
        self._over = True
        self._up_or_over.set()

    def _take(self, message: FromEngine) -> None:
        match message:
            case Loading(what=what):
                log.info("engine loading", engine=self.name, what=what)
            case Ready(report=report) if isinstance(report, self.report_type):
                self._welcome(report)
            case Unusable(reason=reason):
                raise EngineUnusable(reason)
            case Progressed(order=number, fraction=fraction, stage=stage):
                self._orders.report(number, fraction, stage)
            case Done(order=number, result=result):
                self._orders.answer(number, result)
            case RequestFailed(order=number, code=code, reason=reason):
                self._orders.answer(number, error_of_code(code, reason))
            case ScratchFull(order=number):
                self._orders.answer(number, DiskFull())
            case EngineStats():
                self.usage.note(message, time.monotonic())
            case _:
                log.error("engine said something that is not its part", engine=self.name, kind=message.kind)

    def _welcome(self, report: ReportT) -> None:
        self.report = report
        self.usage.process_ready(time.monotonic())
        self._up = True
        self._up_or_over.set()
        if not self._first.done():
            self._first.set_result(report)

    def _lose(self, exit_code: int, fault: str | None) -> None:
        """Tell all who wait for the process that it is gone; ``fault`` is why it was killed, if it was."""
        stopping = self._stopping.is_set()
        inside = len(self._orders)
        reason = fault or f"it ended with {_said(exit_code)}"
        if not stopping:
            log.error("engine process gone", engine=self.name, exit_code=exit_code, reason=reason, inside=inside)
        self._orders.lose(lambda: Interrupted("the worker stops") if stopping else ProcessLost(reason, inside))


def _said(exit_code: int) -> str:
    """Name an exit code, or the signal that a negative one stands for."""
    try:
        return f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
    except ValueError:
        return f"signal {-exit_code}"
