# SPDX-License-Identifier: Apache-2.0
"""Supervision of one engine process: it is started, watched and replaced, and each request gets its own answer.

A request is a message with a future. When the process dies, by a crash or killed for a fault that the watchdog found,
its requests are sent again to the next process; their deliveries stay unsettled meanwhile. A request that was alone in
the process is counted as the cause. Of several, none is: each becomes a suspect and runs alone on the next process,
before any other request does. A request that was the cause too often fails with ``EngineCrashed``.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import structlog

from acestep_consumer.concurrency.locks import SharedLock
from acestep_consumer.config.settings import LogLevel
from acestep_consumer.domain.errors import DiskFull, EngineCrashed, Interrupted, error_of_code
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.engine.messages import (
    Alive,
    Configure,
    ConfigurePlanner,
    Done,
    EngineStats,
    FromEngine,
    LmStats,
    Loading,
    Progressed,
    Ready,
    RequestFailed,
    ScratchFull,
    SetLogLevel,
    StartPhase,
    Stop,
    ToEngine,
    Unusable,
)
from acestep_consumer.engine.pending_requests import PendingRequests
from acestep_consumer.engine.process import EngineProcess
from acestep_consumer.engine.process_memory import held_bytes
from acestep_consumer.engine.watchdog import Watchdog, WatchdogLimits

ConfigureT = TypeVar("ConfigureT", Configure, ConfigurePlanner)
ReportT = TypeVar("ReportT")
AnswerT = TypeVar("AnswerT")

FIRST_RESTART_S, LAST_RESTART_S = 0.5, 30.0
MAX_FAILED_STARTS = 3

log = structlog.get_logger()


class EngineUnusable(Exception):
    """The engine cannot start with these settings; the text says what to change."""


class ProcessLost(Exception):
    """The process died with this request inside, beside ``pending`` - 1 others."""

    def __init__(self, reason: str, pending: int) -> None:
        super().__init__(reason)
        self.pending = pending

    @property
    def blame(self) -> int:
        """1 for a request that was alone in the process, else 0."""
        return 1 if self.pending == 1 else 0


@dataclass(frozen=True, slots=True)
class EngineState:
    """State of an engine: whether it accepts requests, and how often its process was replaced."""

    ready: bool
    restarts: int


class StartClock:
    """Seconds that the parts of a process's start took; the first one is ``imports``."""

    def __init__(self, now_s: float) -> None:
        self._phase: StartPhase | None = "imports"
        self._since_s = now_s
        self.seconds: dict[StartPhase, float] = {}

    def begin(self, phase: StartPhase, now_s: float) -> None:
        """A part begins, or another step of the one before."""
        self.end(now_s)
        self._phase = phase

    def end(self, now_s: float) -> None:
        """The last part has ended."""
        if self._phase is not None:
            before = self.seconds.get(self._phase, 0.0)
            self.seconds[self._phase] = round(before + now_s - self._since_s, 3)
        self._phase, self._since_s = None, now_s


class Supervisor(Generic[ConfigureT, ReportT]):
    """One engine process and its successors. A subclass sets its name, its module and the type of its report.

    Args:
        configure: the first message to each process.
        max_attempts: processes that may die of one request before it fails.
        limits: limits beyond which a process is killed and replaced.
        module: another module to run, which uses the same messages.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    report_type: type[ReportT]

    def __init__(
        self,
        configure: ConfigureT,
        *,
        max_attempts: int,
        limits: WatchdogLimits | None = None,
        module: str | None = None,
    ) -> None:
        self._module = module or self.module
        self._configure: ConfigureT = configure
        self._max_attempts = max_attempts
        self._limits = limits or WatchdogLimits()
        self._requests = PendingRequests()
        self._access = SharedLock()
        self._first_report: asyncio.Future[ReportT] = asyncio.get_running_loop().create_future()
        self._ready = False
        self._closed = False
        self._ready_or_closed = asyncio.Event()
        self._process: EngineProcess | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._start_clock = StartClock(0)
        self.environment: Mapping[str, str] = {}
        """Variables for each process, beside the inherited ones."""
        self.usage = DeviceUsage()
        self.report: ReportT | None = None
        self.restarts = 0

    @property
    def ready(self) -> bool:
        """Whether a process is up with its models loaded."""
        return self._ready

    @property
    def state(self) -> EngineState:
        """Whether requests are accepted, and how often the process was replaced."""
        return EngineState(self._ready, self.restarts)

    @property
    def start_seconds(self) -> Mapping[StartPhase, float]:
        """Seconds of each part of the last start, so far."""
        return self._start_clock.seconds

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return self._process.pid if self._process else None

    async def start(self) -> ReportT:
        """Start the process and wait until its models are loaded. Raises ``EngineUnusable``."""
        self._supervision = asyncio.create_task(self._supervise(), name=f"{self.name} supervisor")
        await asyncio.wait((self._supervision, self._first_report), return_when=asyncio.FIRST_COMPLETED)
        if self._supervision.done():
            self._supervision.result()
            raise EngineUnusable(f"the {self.name} was stopped while it was loading")
        return self._first_report.result()

    async def wait_unusable(self) -> None:
        """Wait until the engine cannot be started any more. Raises ``EngineUnusable`` then."""
        if self._supervision is not None:
            await asyncio.shield(self._supervision)

    async def stop(self) -> None:
        """End the process; pending requests are interrupted."""
        self._stopping.set()
        self._close()
        if self._process is not None:
            self._process.close()
        if self._supervision is not None:
            with suppress(EngineUnusable):
                await self._supervision

    async def ask(
        self,
        task_id: str,
        message_for: Callable[[int], ToEngine],
        answer_type: type[AnswerT],
        report: Report,
        *,
        tries: int | None = None,
    ) -> AnswerT:
        """Send a request and return its answer; if the process dies, send it to the next one.

        Cancelling the call stops the work in the process at its next step.

        Args:
            task_id: for the log.
            message_for: makes the message from its request id.
            answer_type: type of the answer.
            report: called with the request's progress.
            tries: processes that may die of this request before it fails, 1 or more; None: ``max_attempts``.

        Raises:
            EngineCrashed: ``tries`` processes died of this request.
            Interrupted: the supervisor was stopped, or cannot start the engine any more.
        """
        tries = self._max_attempts if tries is None else tries
        try:
            result = await self._ask_shared(message_for, report)
        except ProcessLost as loss:
            self._log_loss(task_id, loss)
            result = await self._ask_alone(task_id, message_for, report, loss, tries)
        if not isinstance(result, answer_type):
            raise TypeError(f"{self.name} answered with {type(result).__name__}, not {answer_type.__name__}")
        return result

    def set_log_level(self, level: LogLevel) -> None:
        """Set the minimum log level of this process, and of each that replaces it."""
        self._configure = replace(self._configure, log_level=level)
        self._send(SetLogLevel(log_level=level))

    async def _ask_shared(self, message_for: Callable[[int], ToEngine], report: Report) -> object:
        """Send a request beside others. Raises ``ProcessLost``."""
        while True:
            await self._wait_ready()
            async with self._access.shared():
                # The process may have died while this waited for access: then suspects go first again.
                if self._ready:
                    return await self._ask_once(message_for, report)

    async def _ask_alone(
        self, task_id: str, message_for: Callable[[int], ToEngine], report: Report, loss: ProcessLost, tries: int
    ) -> object:
        """Send a suspect's request with nothing else in the process, until it is done or was the cause too often."""
        blamed = loss.blame
        if blamed >= tries:
            raise self._crashed(blamed, loss)
        async with self._access.alone():
            while blamed < tries:
                # A stopped request has released its access, but may still be in the process.
                await self._requests.wait_empty()
                await self._wait_ready()
                try:
                    return await self._ask_once(message_for, report)
                except ProcessLost as again:
                    self._log_loss(task_id, again)
                    loss, blamed = again, blamed + again.blame
        raise self._crashed(blamed, loss)

    def _crashed(self, blamed: int, loss: ProcessLost) -> EngineCrashed:
        times = "once" if blamed == 1 else f"{blamed} times"
        return EngineCrashed(f"the {self.name} process died {times} with this job inside; the last time {loss}")

    async def _ask_once(self, message_for: Callable[[int], ToEngine], report: Report) -> object:
        request_id, answer = self._requests.add(report, time.monotonic())
        try:
            self._send(message_for(request_id))
            result = await answer
        except asyncio.CancelledError:
            if self._requests.stop(request_id, time.monotonic()):
                self._send(Stop(request_id=request_id))
            raise
        except Exception:  # it was never sent: nothing would answer it, and the watchdog would blame the process
            self._requests.answer(request_id, None)
            raise
        if isinstance(result, Exception):
            raise result
        return result

    async def _wait_ready(self) -> None:
        """Wait for a process that accepts requests. Raises ``Interrupted`` when none will be started."""
        while not self._ready:
            if self._closed:
                raise Interrupted("the worker stops")
            await self._ready_or_closed.wait()

    def _log_loss(self, task_id: str, loss: ProcessLost) -> None:
        log.warning(
            "engine process died during a job",
            engine=self.name,
            task_id=task_id,
            pending=loss.pending,
            reason=str(loss),
        )

    def _send(self, message: ToEngine) -> None:
        if self._process is not None:
            self._process.send(message)

    async def _supervise(self) -> None:
        """Run one process after the other, until stopped or until one reports that the engine is unusable."""
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
                if failures and self.report is None:
                    self._on_failed_start()
                self.restarts += 1
                await self._back_off(failures)
        finally:
            self._close()

    def _on_failed_start(self) -> None:
        """Hook: a first process died while loading, and another will be started."""

    async def _back_off(self, failures: int) -> None:
        pause_s = min(FIRST_RESTART_S * 2**failures, LAST_RESTART_S)
        log.warning("engine restarts", engine=self.name, in_s=pause_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()

    async def _run_one(self) -> bool:
        """Run one process to its end. Returns whether it had become ready."""
        try:
            process = await EngineProcess.start(self._module, self.environment)
        except OSError as error:  # no memory or no process table entry left: that may pass
            log.error("engine process cannot be started", engine=self.name, reason=str(error))  # noqa: TRY400 - a condition, not a bug
            return False
        self._process = process
        self._start_clock = StartClock(time.monotonic())
        if self._stopping.is_set():
            process.close()
        watchdog = Watchdog(self._limits, time.monotonic())
        monitor = asyncio.create_task(self._monitor(process, watchdog), name=f"{self.name} watchdog")
        was_ready = False
        try:
            process.send(self._configure)
            async for message in process.messages():
                watchdog.observe(message, time.monotonic())
                self._handle(message)
                was_ready = was_ready or self._ready
        finally:
            monitor.cancel()
            self._on_closed_pipe()
            self._fail_pending(await process.end(), watchdog.kill_reason)
        return was_ready

    async def _monitor(self, process: EngineProcess, watchdog: Watchdog) -> None:
        """Kill the process once the watchdog finds a fault.

        Two checks in a row must find one: if this process itself was suspended, unread messages are read in between.
        """
        faulty_before = False
        while True:
            await asyncio.sleep(self._limits.check_interval_s)
            try:
                fault = watchdog.fault(self._requests, held_bytes(process.pid), time.monotonic())
            except Exception:
                log.exception("engine process could not be checked", engine=self.name, pid=process.pid)
                continue
            if fault and faulty_before:
                watchdog.kill_reason = fault
                log.error("engine process is killed", engine=self.name, pid=process.pid, reason=fault)
                await process.kill()
                return
            faulty_before = fault is not None

    def _on_closed_pipe(self) -> None:
        self._ready = False
        if not self._closed:
            self._ready_or_closed.clear()
        self._process = None
        self.usage.process_gone()

    def _close(self) -> None:
        """Note that no process will be started any more, and wake those who wait for one."""
        self._closed = True
        self._ready_or_closed.set()

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Loading(step=step, phase=phase):
                log.info("engine loading", engine=self.name, step=step)
                self._start_clock.begin(phase, time.monotonic())
            case Ready(report=report) if isinstance(report, self.report_type):
                self._on_ready(report)
            case Unusable(reason=reason):
                raise EngineUnusable(reason)
            case Progressed(request_id=request_id, fraction=fraction, stage=stage):
                self._requests.report(request_id, fraction, stage)
            case Done(request_id=request_id, result=result):
                self._requests.answer(request_id, result)
            case RequestFailed(request_id=request_id, code=code, reason=reason, problems=problems):
                self._requests.answer(request_id, error_of_code(code, reason, problems))
            case ScratchFull(request_id=request_id):
                self._requests.answer(request_id, DiskFull())
            case Alive():
                pass  # for the watchdog alone
            case EngineStats() | LmStats():
                self.usage.note(message, time.monotonic())
            case _:
                log.error("unexpected message from the engine process", engine=self.name, kind=message.kind)

    def _on_ready(self, report: ReportT) -> None:
        self.report = report
        self._start_clock.end(time.monotonic())
        log.info("engine started", engine=self.name, seconds=self.start_seconds)
        self.usage.process_ready(time.monotonic())
        self._ready = True
        self._ready_or_closed.set()
        if not self._first_report.done():
            self._first_report.set_result(report)

    def _fail_pending(self, exit_code: int, kill_reason: str | None) -> None:
        """Fail all pending requests: the process is gone."""
        stopping = self._stopping.is_set()
        pending = len(self._requests)
        reason = kill_reason or f"it ended with {_exit_text(exit_code)}"
        if not stopping:
            log.error("engine process ended", engine=self.name, exit_code=exit_code, reason=reason, pending=pending)
        self._requests.answer_all(lambda: Interrupted("the worker stops") if stopping else ProcessLost(reason, pending))


def _exit_text(exit_code: int) -> str:
    """Return an exit code as text; a negative one stands for a signal."""
    try:
        return f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
    except ValueError:
        return f"signal {-exit_code}"
