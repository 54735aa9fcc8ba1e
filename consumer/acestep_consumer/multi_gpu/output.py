# SPDX-License-Identifier: Apache-2.0
"""Merges the output of several workers; each line is prefixed with the name of its worker."""

import os
import sys
import threading
from contextlib import suppress

_LONGEST_LINE = 1 << 20


class LabelledOutput:
    """Copies a worker's output with a prefix.

    Pass ``inlet`` to the worker as stdout and stderr, then call ``opened``. A thread does the copying: a terminal that
    is paused with Ctrl-S must not block the parent's signal handling.
    """

    def __init__(self, label: str) -> None:
        self._outlet, self.inlet = os.pipe()
        self._prefix = f"{label} | ".encode()
        self._target = sys.stderr.buffer
        self._thread = threading.Thread(target=self._copy, name=f"output of {label}", daemon=True)
        self._thread.start()

    def opened(self) -> None:
        """Close our copy of the inlet once the worker has it or failed to start; the worker's end closes the other."""
        os.close(self.inlet)

    def finish(self, within_s: float) -> None:
        """Wait for the remaining output; an engine process may keep the inlet open a little longer than its worker."""
        self._thread.join(within_s)

    def _copy(self) -> None:
        with os.fdopen(self._outlet, "rb") as outlet:
            while line := outlet.readline(_LONGEST_LINE):
                # Keep reading if the target is closed: a worker whose pipe is full would block.
                with suppress(OSError):
                    self._target.write(self._prefix + line.removesuffix(b"\n") + b"\n")
                    self._target.flush()
