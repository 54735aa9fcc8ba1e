# SPDX-License-Identifier: Apache-2.0
"""Keeps one worker process running at each seat: starts them, passes signals on, replaces the ones that die.

Workers run in sessions of their own. A terminal's Ctrl-C, which goes to a whole process group, reaches the fleet alone,
and each worker hears it once: a second one would make it drop the work in hand.
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
"""A worker that lived this long did start: the next restart is as quick as the first, and the settings are good."""

_LAST_WORDS_S = 5.0
_NOT_AGAIN = (Exit.DONE, Exit.USAGE, Exit.ENGINE)
"""Another start would end the same way; or somebody told this worker alone to leave."""

log = structlog.get_logger()


class WorkerGroup:
    """Workers, one at each seat.

    Args:
        seats: the places, each with what its worker's environment has beyond the common one.
        command: what starts a worker; ``--lifeline FD`` is added.
        environment: what all workers have in common.
        labelled: head each line of output with the seat's name; else the workers write where this process writes.
        steady_s: how long a worker lives that did not fail to start, seconds.
    """

    def __init__(
        self,
        seats: Sequence[Placement],
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        labelled: bool,
        steady_s: float = STEADY_S,
    ) -> None:
        self._seats = seats
        self._command = command
        self._environment = environment
        self._labelled = labelled
        self._steady_s = steady_s
        self._lifeline = ParentPipe()
        self._workers: dict[str, asyncio.subprocess.Process] = {}
        self._signals: list[signal.Signals] = []
        self._stopping = asyncio.Event()
        self._terminal = Terminal()

    async def run(self) -> int:
        """Run until every worker has left for good. Returns 0, or the exit code of the first seat that has another."""
        with self._lifeline, _signals(self._forward):
            codes = await asyncio.gather(*map(self._keep, self._seats))
        log.info("fleet ends", exit_codes={seat.name: code for seat, code in zip(self._seats, codes, strict=True)})
        return next((code for code in codes if code != Exit.DONE), Exit.DONE)

    async def _keep(self, seat: Placement) -> int:
        """Keep a worker at this seat until one leaves for good. Returns that one's exit code."""
        pause, proven = FIRST_RESTART_S, False
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._run_one(seat)
            if self._stopping.is_set():
                return self._as_told(code)
            # Storage that is away at a restart is USAGE too; where a worker ran before, trying again may well help.
            if code in _NOT_AGAIN and not (proven and code == Exit.USAGE):
                self._tell_final(seat, code)
                return code
            if time.monotonic() - began >= self._steady_s:
                pause, proven = FIRST_RESTART_S, True
            log.error("worker died", seat=seat.name, exit_code=code, restarts_in_s=pause)
            await self._sleep(pause)
            pause = min(2 * pause, LAST_RESTART_S)
        return Exit.DONE

    async def _run_one(self, seat: Placement) -> int:
        """Run one worker to its end. Returns its exit code as a shell gives it: 128 and the number for a signal."""
        output = LabelledOutput(seat.name) if self._labelled else None
        try:
            worker = await self._start(seat, output)
        except OSError as error:
            log.error("worker does not start", seat=seat.name, reason=str(error))  # noqa: TRY400 - the text is all
            return Exit.JOB_FAILED
        finally:
            if output is not None:
                output.opened()
        log.info("worker started", seat=seat.name, pid=worker.pid)
        code = await worker.wait()
        del self._workers[seat.name]
        if output is not None:
            await asyncio.to_thread(output.finish, _LAST_WORDS_S)
        return code if code >= 0 else 128 - code

    async def _start(self, seat: Placement, output: LabelledOutput | None) -> asyncio.subprocess.Process:
        inlet = output.inlet if output is not None else None
        # A worker that has not come so far as to listen would die of a SIGHUP. It inherits that they are held back.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            worker = await asyncio.create_subprocess_exec(
                *self._command,
                "--lifeline",
                str(self._lifeline.worker_end),
                env={**self._environment, **seat.environment},
                pass_fds=[self._lifeline.worker_end],
                start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=inlet,
                stderr=inlet,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        self._workers[seat.name] = worker
        # Signals that came while it was being born.
        for number in self._signals:
            _send(worker, number)
        return worker

    def _forward(self, number: signal.Signals) -> None:
        """Give every worker this signal, once. SIGHUP has them read their settings, unless our terminal is gone."""
        if number == signal.SIGHUP and self._terminal.gone():
            mute()
            number = signal.SIGTERM
        if number != signal.SIGHUP:
            self._signals.append(number)
            self._stopping.set()
        for worker in self._workers.values():
            _send(worker, number)
        log.info("signal passed on", signal=number.name, workers=list(self._workers))

    def _as_told(self, code: int) -> int:
        """A worker that was still starting dies of SIGTERM or Ctrl-C: it had no work in hand, so all is well."""
        told = {128 + number for number in self._signals}
        return Exit.DONE if code in told else code

    def _tell_final(self, seat: Placement, code: int) -> None:
        others = [name for name in self._workers if name != seat.name]
        if code == Exit.DONE:
            log.info("worker left", seat=seat.name, others=others)
            return
        log.error(
            "worker cannot work and is not started again; its own last line says why",
            seat=seat.name,
            exit_code=code,
            others=others,
        )

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not longer than until a signal."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)


def _send(worker: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        worker.send_signal(number)


@contextmanager
def _signals(handler: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``handler`` on SIGTERM, SIGINT and SIGHUP; a SIGHUP that is ignored, as under nohup, stays so."""
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
