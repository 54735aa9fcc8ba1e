# SPDX-License-Identifier: Apache-2.0
"""Watchdog of an engine process: finds hangs, requests that do not stop, and memory growth."""

from dataclasses import dataclass

from acestep_consumer.engine.messages import (
    DeviceFound,
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
"""A stopped request ends at its next step. Steps take up to seconds."""

START_S = 1800.0
"""Between two signs of progress while loading: a checkpoint may come from a slow disk or the hub, or be compiled."""

SILENCE_S = 60.0
"""Least time without a heartbeat until a loading process counts as hung: before its first one it imports packages."""

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogLimits:
    """Limits beyond which a process is killed and replaced.

    Attributes:
        hang_s: seconds without progress while it has requests.
        stop_s: seconds until it answers a stopped request.
        start_s: seconds without progress while it loads.
        silence_s: seconds without any message while it loads; heartbeats come every few seconds.
        ram_bytes: RAM that it may hold; None: any.
        ram_source: the setting or rule that ``ram_bytes`` comes from, for the log.
        check_interval_s: seconds between two checks.
    """

    hang_s: float = 300.0
    stop_s: float = STOP_S
    start_s: float = START_S
    silence_s: float = 300.0
    ram_bytes: int | None = None
    ram_source: str = "ACESTEP_ENGINE_RAM_GB"
    check_interval_s: float = 1.0


class Watchdog:
    """Watches one process. It has no clock: callers pass the time, in seconds of any monotonic clock.

    ``kill_reason`` is the fault for which the process was killed, once it was.
    """

    def __init__(self, limits: WatchdogLimits, now_s: float) -> None:
        self._limits = limits
        self._progress_s = now_s
        self._heard_s = now_s
        self._songs_done = 0
        self._ready = False
        self._waiting = False
        self.kill_reason: str | None = None

    def observe(self, message: FromEngine, now_s: float) -> None:
        """Note a message that is a sign of progress. Stats are one only if they count another finished song."""
        self._heard_s = now_s
        match message:
            case EngineStats(songs_done=songs):
                if songs <= self._songs_done:
                    return
                self._songs_done = songs
            case Ready():
                self._ready = True
            case Loading(phase=phase):
                self._waiting = phase == "waiting"
            case DeviceFound() | Progressed() | Done() | RequestFailed() | ScratchFull():
                pass
            case _:
                return
        self._progress_s = now_s

    def fault(self, requests: PendingRequests, held: int | None, now_s: float) -> str | None:
        """Return why the process must be replaced, or None. ``held`` is its RAM in bytes; None: unknown."""
        return (
            self._memory_fault(held)
            or self._start_fault(now_s)
            or self._stop_fault(requests, now_s)
            or self._hang_fault(requests, now_s)
        )

    def _memory_fault(self, held: int | None) -> str | None:
        limit = self._limits.ram_bytes
        if held is None or limit is None or held <= limit:
            return None
        return (
            f"it held {held / _GIB:.2f} GB of RAM, above the limit of {limit / _GIB:.2f} GB ({self._limits.ram_source})"
        )

    def _start_fault(self, now_s: float) -> str | None:
        if self._ready:
            return None
        if now_s - self._heard_s > self._limits.silence_s:
            limit = f"{self._limits.silence_s:g} s while loading (ACESTEP_ENGINE_HANG_S)"
            return f"it was paused or hung: no message for {limit}"
        # While it waits for the other engine, its own progress is none.
        if self._waiting or now_s - self._progress_s <= self._limits.start_s:
            return None
        return f"it made no progress while loading for {self._limits.start_s:g} s"

    def _stop_fault(self, requests: PendingRequests, now_s: float) -> str | None:
        stopped_s = requests.first_stop_s
        if stopped_s is None or now_s - stopped_s <= self._limits.stop_s:
            return None
        return f"it did not end a stopped request within {self._limits.stop_s:g} s"

    def _hang_fault(self, requests: PendingRequests, now_s: float) -> str | None:
        if not self._ready or not requests:
            return None
        if now_s - max(self._progress_s, requests.since_s) <= self._limits.hang_s:
            return None
        return f"it hung: no progress for {self._limits.hang_s:g} s (ACESTEP_ENGINE_HANG_S) with pending requests"
