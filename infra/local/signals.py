# SPDX-License-Identifier: Apache-2.0
"""Owns the way out on Ctrl-C, SIGTERM and a closed terminal: every `finally` runs, once, undisturbed."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_cleanly_on_signals() -> None:
    """Make the first of these signals raise SystemExit in the main thread and ignore the others from then on.

    The exit status is a shell's: 128 plus the signal's number. Clean-up is bounded in time, so it need not be hurried.
    """
    for number in _ENDINGS:
        signal.signal(number, _stop)


@contextmanager
def held() -> Iterator[None]:
    """Keep these signals back until the block is left: for the moment between a child's birth and knowing its number.

    Not by a signal mask, which the child would inherit. Outside the main thread signals never interrupt anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in _ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in arrived:
            signal.raise_signal(late)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    for other in _ENDINGS:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)
