# SPDX-License-Identifier: Apache-2.0
"""What workers print, as one stream: each line headed by the name of the worker that wrote it."""

import os
import sys
import threading
from contextlib import suppress
from typing import BinaryIO

_LONGEST_LINE = 1 << 20


class LabelledOutput:
    """A worker's output. Give ``inlet`` to the worker as its stdout and stderr, then close it here with ``opened``.

    A thread copies: a terminal that is held back with Ctrl-S must not keep the fleet from hearing signals.
    """

    def __init__(self, label: str, target: BinaryIO | None = None) -> None:
        self._outlet, self.inlet = os.pipe()
        self._head = f"{label} | ".encode()
        self._target = target or sys.stderr.buffer
        self._thread = threading.Thread(target=self._copy, name=f"output of {label}", daemon=True)
        self._thread.start()

    def opened(self) -> None:
        """The worker has the inlet, or never will: from now on its end is the end."""
        os.close(self.inlet)

    def finish(self, within_s: float) -> None:
        """Wait for the end; an engine process may hold the inlet a little longer than its worker."""
        self._thread.join(within_s)

    def _copy(self) -> None:
        with os.fdopen(self._outlet, "rb") as outlet:
            while line := outlet.readline(_LONGEST_LINE):
                # Where nobody reads any more it goes nowhere, but it goes: the worker must not stall.
                with suppress(OSError):
                    self._target.write(self._head + line.removesuffix(b"\n") + b"\n")
                    self._target.flush()
