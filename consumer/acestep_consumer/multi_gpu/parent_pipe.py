# SPDX-License-Identifier: Apache-2.0
"""A pipe that ends the workers when their parent process is gone.

Nothing is written to it. The kernel closes the parent's end even if the parent is killed; a worker treats the end of
file as a SIGTERM: it finishes its jobs and exits.
"""

import os
import signal
import sys
import threading
from typing import Self


class ParentPipe:
    """The parent's end, open while the context is entered; workers inherit ``worker_end``."""

    def __enter__(self) -> Self:
        self.worker_end, self._held = os.pipe()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._held)
        os.close(self.worker_end)


def exit_with_parent(worker_end: int, *, labelled: bool) -> None:
    """Send this process SIGTERM when the parent process is gone.

    ``labelled``: our output goes through the parent. With that gone, a log line would raise in the middle of a job, so
    output is discarded from then on.
    """
    threading.Thread(
        target=_wait, args=(worker_end,), kwargs={"labelled": labelled}, name="parent pipe", daemon=True
    ).start()


def mute() -> None:
    """Discard everything that this process prints from now on."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(devnull, stream.fileno())
    os.close(devnull)


def _wait(worker_end: int, *, labelled: bool) -> None:
    os.read(worker_end, 1)
    if labelled:
        mute()
    os.kill(os.getpid(), signal.SIGTERM)


_STDERR = 2


class Terminal:
    """The terminal on stderr, if there was one when this object was created."""

    def __init__(self) -> None:
        self._had_one = _is_terminal()

    def gone(self) -> bool:
        """Whether the terminal was closed since: the kernel detaches it before it sends SIGHUP."""
        return self._had_one and not _is_terminal()


def _is_terminal() -> bool:
    return os.isatty(_STDERR)
