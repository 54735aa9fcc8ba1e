# SPDX-License-Identifier: Apache-2.0
"""Owns the way out on Ctrl-C, SIGTERM and a closed terminal: every `finally` runs, once, undisturbed."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_cleanly_on_signals() -> None:
    """Make the first of these signals raise SystemExit in the main thread and ignore the others from then on.

    The exit status is a shell's: 128 plus the signal's number. Clean-up is bounded in time, so it need not be hurried.
    """
    for number in _ENDINGS:
        signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    for other in _ENDINGS:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)
