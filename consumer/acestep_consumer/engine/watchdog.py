# SPDX-License-Identifier: Apache-2.0
"""Whether an engine process is still of use: it must get on with what it has, let go when told, and not grow.

No clock of its own: whoever calls passes the time, in seconds of any steady clock.
"""

from dataclasses import dataclass

from acestep_consumer.engine.messages import (
    Done,
    EngineStats,
    FromEngine,
    Loading,
    Progressed,
    Ready,
    RequestFailed,
    ScratchFull,
)
from acestep_consumer.engine.pending_requests import PendingRequests

STOP_S = 30.0
"""A stopped order ends at its next step. Steps take up to seconds."""

START_S = 1800.0
"""Between two signs of progress while it loads: a checkpoint may come from a slow disk or a hub, or be compiled."""

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogLimits:
    """What a process may take before it is replaced.

    Attributes:
        hang_s: without progress while it has orders.
        stop_s: until it answers an order that was stopped.
        start_s: without progress while it loads.
        ram_bytes: of RAM held; None: any.
        ram_why: where that number comes from, for the log.
        look_s: between two looks at the process.
    """

    hang_s: float = 300.0
    stop_s: float = STOP_S
    start_s: float = START_S
    ram_bytes: int | None = None
    ram_why: str = "ACESTEP_ENGINE_RAM_GB"
    look_s: float = 1.0


class Watchdog:
    """Over one process. ``found`` is why it was ended, once it was."""

    def __init__(self, bounds: WatchdogLimits, now_s: float) -> None:
        self._bounds = bounds
        self._progress_s = now_s
        self._songs = 0
        self._ready = False
        self.found: str | None = None

    def hear(self, message: FromEngine, now_s: float) -> None:
        """Take a message as a sign of progress, if it is one. Vitals are one when a song more is done."""
        match message:
            case EngineStats(songs_done=songs):
                if songs <= self._songs:
                    return
                self._songs = songs
            case Ready():
                self._ready = True
            case Loading() | Progressed() | Done() | RequestFailed() | ScratchFull():
                pass
            case _:
                return
        self._progress_s = now_s

    def fault(self, orders: PendingRequests, held: int | None, now_s: float) -> str | None:
        """Return why the process must be replaced; None while it is all right. ``held`` is its RAM, in bytes."""
        return (
            self._of_memory(held)
            or self._of_start(now_s)
            or self._of_stop(orders, now_s)
            or self._of_hang(orders, now_s)
        )

    def _of_memory(self, held: int | None) -> str | None:
        limit = self._bounds.ram_bytes
        if held is None or limit is None or held <= limit:
            return None
        return f"it holds {held / _GIB:.2f} GB of RAM, more than {limit / _GIB:.2f} GB ({self._bounds.ram_why})"

    def _of_start(self, now_s: float) -> str | None:
        if self._ready or now_s - self._progress_s <= self._bounds.start_s:
            return None
        return f"it loaded for {self._bounds.start_s:g} s without progress"

    def _of_stop(self, orders: PendingRequests, now_s: float) -> str | None:
        stopped_s = orders.first_stop_s
        if stopped_s is None or now_s - stopped_s <= self._bounds.stop_s:
            return None
        return f"it went on for {self._bounds.stop_s:g} s with an order that was stopped"

    def _of_hang(self, orders: PendingRequests, now_s: float) -> str | None:
        if not self._ready or not orders:
            return None
        if now_s - max(self._progress_s, orders.since_s) <= self._bounds.hang_s:
            return None
        return f"it hung: no progress for {self._bounds.hang_s:g} s (ACESTEP_ENGINE_HANG_S) with work inside"
