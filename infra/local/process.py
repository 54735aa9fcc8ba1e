# SPDX-License-Identifier: Apache-2.0
"""Starts and stops processes, each in its own group and with a log; stopped by pid, never by name.

A guarded process also ends when we are killed and cannot clean up: a small shell waits at a pipe that only we hold
open, and the kernel closes it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.local.signals import held

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_POLL_S = 0.05
# One that ends is noticed at once; on a busy machine a start has taken three quarters of a minute.
_START_TIMEOUT_S = 240.0
_LOG_TAIL_LINES = 25

# Waits for end of file on standard input, then ends the process given as the first argument, and its group.
_GUARD = 'read -r _; kill -TERM "$1" && sleep 5; kill -KILL -- "-$1"'


class ServerError(RuntimeError):
    """A local server could not be started; the message says which, why, and what to do."""


@dataclass(frozen=True)
class ProcessId:
    """A process by pid and start time (clock ticks since boot), so that a reused pid is not mistaken for it."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Return the identity of a running process, or of a child that ended and was not waited for yet.

        Raises:
            ProcessLookupError: there is no such process.
        """
        found = _state_and_start(pid)
        if found is None:
            raise ProcessLookupError(f"there is no process {pid}")
        return cls(pid, found[1])

    def alive(self) -> bool:
        """Whether this process runs; a zombie does not."""
        found = _state_and_start(self.pid)
        return found is not None and found[0] != "Z" and found[1] == self.started

    def end(self, grace_s: float = 20.0) -> None:
        """Send SIGTERM to the process; once it is gone, or after `grace_s` seconds, SIGKILL to the rest of its group.

        SIGTERM goes to the leader only, which stops its own children in order.
        """
        if not self.alive():
            return
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self.alive() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        _signal_group(self.pid, signal.SIGKILL)


class Process:
    """A child process in its own session, so that a Ctrl-C in the terminal reaches us and not it."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], folder: Path, log: Path, guarded: bool) -> None:
        """Start it.

        Args:
            argv: the command.
            env: its whole environment.
            folder: its working folder.
            log: standard output and error are appended here.
            guarded: end it when this process dies; False: it keeps running.

        Raises:
            ServerError: the command cannot be started.
        """
        self.log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        try:
            # A signal in between would leave a server that is not recorded.
            with held():
                self._child = _start(argv, env, folder, log)
                self.id = ProcessId.of(self._child.pid)
                self._guard = _start_guard(self._child.pid) if guarded else None
        except OSError as error:
            raise ServerError(f"could not start {argv[0]}: {error.strerror}") from error
        except BaseException:
            self.kill()
            raise

    def running(self) -> bool:
        """Whether the process runs."""
        return self._child is not None and self._child.poll() is None

    def returncode(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return None if self._child is None else self._child.poll()

    def end(self, grace_s: float = 20.0) -> None:
        """Send SIGTERM, then SIGKILL after `grace_s` seconds; can be called again."""
        if self.running():
            self.id.end(grace_s)
        self._reap()

    def kill(self) -> None:
        """Send SIGKILL, as a power failure would."""
        if self.running():
            _signal_group(self.id.pid, signal.SIGKILL)
        self._reap()

    def _reap(self) -> None:
        if self._child is not None:
            self._child.wait()
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.kill()
            guard.communicate()


def wait_until(
    ready: Callable[[], bool], *, what: str, processes: Sequence[Process], timeout_s: float = _START_TIMEOUT_S
) -> None:
    """Poll `ready` until it is true.

    Raises:
        ServerError: a process ended first, or `timeout_s` seconds passed; with the last lines of the process's log.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        for process in processes:
            if not process.running():
                raise ServerError(
                    f"{what} ended with status {process.returncode()} before it was ready\n{tail(process.log)}"
                )
        if time.monotonic() > deadline:
            raise ServerError(f"{what} was not ready after {timeout_s:.0f} s\n{tail(processes[0].log)}")
        time.sleep(_POLL_S)


def tail(log: Path, lines: int = _LOG_TAIL_LINES) -> str:
    """Return the path and the last lines of a log, or that it is empty."""
    text = log.read_text(errors="replace") if log.exists() else ""
    last = "\n".join(text.splitlines()[-lines:])
    return f"--- end of {log}\n{last}" if last else f"--- {log} is empty"


def _start(argv: Sequence[str], env: Mapping[str, str], folder: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            argv,
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _state_and_start(pid: int) -> tuple[str, str] | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in parentheses, may contain anything: split after the last one.
    fields = stat.rpartition(")")[2].split()
    return fields[0], fields[19]


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def _start_guard(pid: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
