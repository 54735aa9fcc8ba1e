# SPDX-License-Identifier: Apache-2.0
"""No worker outlives its fleet: a pipe that nobody writes to, and whose end says that the fleet's process is gone.

The kernel closes it also when that process was killed. A worker takes the end for a SIGTERM: it drains and leaves.
"""

import os
import signal
import sys
import threading
from types import TracebackType
from typing import Self


class ParentPipe:
    """The fleet's end. Entering opens the pipe, leaving closes it; ``worker_end`` is for the workers to inherit."""

    def __enter__(self) -> Self:
        self.worker_end, self._held = os.pipe()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._held)
        os.close(self.worker_end)


def leave_with_fleet(worker_end: int, *, labelled: bool) -> None:
    """From now on, drain this process when the fleet's is gone.

    ``labelled``: what we print goes through the fleet's process. With it gone, a line of log would be an error in the
    middle of a job, so then it goes nowhere.
    """
    threading.Thread(
        target=_wait, args=(worker_end,), kwargs={"labelled": labelled}, name="lifeline", daemon=True
    ).start()


def mute() -> None:
    """Send what this process prints from now on nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _wait(worker_end: int, *, labelled: bool) -> None:
    os.read(worker_end, 1)
    if labelled:
        mute()
    os.kill(os.getpid(), signal.SIGTERM)


_STDERR = 2


class Terminal:
    """The terminal that this process writes to, if it does; looked at when this is made."""

    def __init__(self) -> None:
        self._had_one = _is_terminal()

    def gone(self) -> bool:
        """Whether it was there and is no more: the kernel takes it away before it sends SIGHUP."""
        return self._had_one and not _is_terminal()


def _is_terminal() -> bool:
    return os.isatty(_STDERR)
