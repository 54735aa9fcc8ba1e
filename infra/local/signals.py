# SPDX-License-Identifier: Apache-2.0
"""Exits cleanly on Ctrl-C, SIGTERM and a closed terminal: every `finally` runs, and only once."""

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
    """Raise SystemExit in the main thread on the first of these signals, and ignore further ones.

    The exit status is that of a shell: 128 + the signal's number. Clean-up takes a bounded time.
    """
    for number in _ENDINGS:
        signal.signal(number, _stop)


@contextmanager
def held() -> Iterator[None]:
    """Delay these signals until the block is left: between starting a child and knowing its pid.

    Not with a signal mask, which the child would inherit. Outside the main thread signals never interrupt anyway.
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
