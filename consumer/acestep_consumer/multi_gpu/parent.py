# SPDX-License-Identifier: Apache-2.0
"""The parent process of a group of workers: starts one per GPU, forwards signals, restarts workers that die.

Workers run in sessions of their own. Ctrl-C in a terminal goes to a whole process group; this way it reaches the parent
alone, and each worker gets it once: a second one would make it abandon its running jobs.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import structlog

from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.multi_gpu.output import LabelledOutput
from acestep_consumer.multi_gpu.parent_pipe import ParentPipe, Terminal, mute
from acestep_consumer.multi_gpu.placement import Placement

FIRST_RESTART_S: Final = 0.5
LAST_RESTART_S: Final = 30.0
STEADY_S: Final = 60.0
"""A worker that ran this long has started successfully: the settings are good, and the restart delay starts over."""

MAX_REFUSED_STARTS: Final = 10
"""Starts in a row that may end with USAGE once a worker has run: storage or broker may refuse for some minutes."""

MAX_CRASHED_STARTS: Final = 5
"""Starts in a row that may end with UNEXPECTED before a steady run: most often each one meets the same bug."""

_OUTPUT_S = 5.0
_FINAL = (Exit.DONE, Exit.USAGE, Exit.ENGINE)
"""Exit codes after which a worker is not restarted: it would end the same way, or was asked to stop by itself."""

log = structlog.get_logger()


class RestartPolicy:
    """Decides whether a worker that ended is restarted, and after how many seconds.

    Args:
        steady_s: run time in seconds after which a worker counts as successfully started.
    """

    def __init__(self, steady_s: float = STEADY_S) -> None:
        self._steady_s = steady_s
        self._delay_s = FIRST_RESTART_S
        self._proven = False
        self._refused = 0
        self._crashed = 0

    def delay_after(self, code: int, ran_s: float) -> float | None:
        """Return the delay in seconds before the restart of a worker that ended after ``ran_s``; None: no restart."""
        if ran_s >= self._steady_s:
            self._delay_s, self._proven, self._refused, self._crashed = FIRST_RESTART_S, True, 0, 0
        # A worker also exits with USAGE if storage or broker refuses; after a successful start, a restart may help.
        self._refused = self._refused + 1 if code == Exit.USAGE else 0
        self._crashed = self._crashed + 1 if code == Exit.UNEXPECTED and ran_s < self._steady_s else 0
        if code in _FINAL and not (self._proven and 0 < self._refused <= MAX_REFUSED_STARTS):
            return None
        if self._crashed > MAX_CRASHED_STARTS:
            return None
        delay, self._delay_s = self._delay_s, min(2 * self._delay_s, LAST_RESTART_S)
        return delay


class WorkerGroup:
    """A worker process for each placement.

    Args:
        placements: what each worker's environment has beyond the common one.
        command: starts a worker; ``--lifeline FD`` is appended.
        environment: common to all workers.
        labelled: prefix each line of output with the placement's name; otherwise workers inherit stdout and stderr.
        steady_s: run time in seconds after which a worker counts as successfully started.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        labelled: bool,
        steady_s: float = STEADY_S,
    ) -> None:
        self._placements = placements
        self._command = command
        self._environment = environment
        self._labelled = labelled
        self._steady_s = steady_s
        self._pipe = ParentPipe()
        self._workers: dict[str, asyncio.subprocess.Process] = {}
        self._signals: list[signal.Signals] = []
        self._stopping = asyncio.Event()
        self._terminal = Terminal()

    async def run(self) -> int:
        """Run until all workers have ended for good. Returns 0, or the first exit code that is another."""
        with self._pipe, _signals(self._forward):
            codes = await asyncio.gather(*map(self._keep, self._placements))
        ended = {each.name: code for each, code in zip(self._placements, codes, strict=True)}
        log.info("all workers ended", exit_codes=ended)
        return next((code for code in codes if code != Exit.DONE), Exit.DONE)

    async def _keep(self, placement: Placement) -> int:
        """Run a worker, and restart it until it ends for good. Returns its exit code."""
        policy = RestartPolicy(self._steady_s)
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._run_one(placement)
            if self._stopping.is_set():
                return self._without_signal(code)
            delay = policy.delay_after(code, time.monotonic() - began)
            if delay is None:
                self._log_final(placement, code)
                return code
            log.error("worker died", gpu=placement.name, exit_code=code, restarts_in_s=delay)
            await self._sleep(delay)
        return Exit.DONE

    async def _run_one(self, placement: Placement) -> int:
        """Run one worker to its end. Returns its exit code as a shell does: 128 + the number of a signal."""
        output = LabelledOutput(placement.name) if self._labelled else None
        try:
            worker = await self._start(placement, output)
        except OSError as error:
            log.error("worker does not start", gpu=placement.name, reason=str(error))  # noqa: TRY400 - the text is all
            return Exit.JOB_FAILED
        finally:
            if output is not None:
                output.opened()
        log.info("worker started", gpu=placement.name, pid=worker.pid)
        code = await worker.wait()
        del self._workers[placement.name]
        if output is not None:
            await asyncio.to_thread(output.finish, _OUTPUT_S)
        return code if code >= 0 else 128 - code

    async def _start(self, placement: Placement, output: LabelledOutput | None) -> asyncio.subprocess.Process:
        inlet = output.inlet if output is not None else None
        # SIGHUP would kill a worker that has not installed its handler yet. It inherits the mask, and unblocks it then.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            worker = await asyncio.create_subprocess_exec(
                *self._command,
                "--lifeline",
                str(self._pipe.worker_end),
                env={**self._environment, **placement.environment},
                pass_fds=[self._pipe.worker_end],
                start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=inlet,
                stderr=inlet,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        self._workers[placement.name] = worker
        # Signals that arrived while it was being started.
        for number in self._signals:
            _send(worker, number)
        return worker

    def _forward(self, number: signal.Signals) -> None:
        """Forward a signal to every worker. SIGHUP reloads their settings, unless it is our terminal that closed."""
        if number == signal.SIGHUP and self._terminal.gone():
            mute()
            number = signal.SIGTERM
        if number != signal.SIGHUP:
            self._signals.append(number)
            self._stopping.set()
        for worker in self._workers.values():
            _send(worker, number)
        log.info("signal forwarded", signal=number.name, workers=list(self._workers))

    def _without_signal(self, code: int) -> int:
        """Return the exit code, 0 if our signal killed a worker that was still starting: it had no job yet."""
        return Exit.DONE if code in {128 + number for number in self._signals} else code

    def _log_final(self, placement: Placement, code: int) -> None:
        others = [name for name in self._workers if name != placement.name]
        if code == Exit.DONE:
            log.info("worker ended", gpu=placement.name, others=others)
            return
        log.error(
            "worker failed and is not restarted; its last log line says why",
            gpu=placement.name,
            exit_code=code,
            others=others,
        )

    async def _sleep(self, seconds: float) -> None:
        """Sleep, or until a signal arrives."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


def _send(worker: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        worker.send_signal(number)


@contextmanager
def _signals(handler: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``handler`` on SIGTERM, SIGINT and SIGHUP; a SIGHUP that is ignored, as under nohup, stays ignored."""
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, handler, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
