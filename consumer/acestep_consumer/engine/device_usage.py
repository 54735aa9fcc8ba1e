# SPDX-License-Identifier: Apache-2.0
"""What an engine's vitals add up to: totals that survive its processes, and the device's idle share of late.

No clock of its own: whoever calls passes the time, in seconds of any steady clock.
"""

from collections import deque

from acestep_consumer.engine.messages import EngineStats

# The share of idle time is that of the last minute: long enough to span a pack, short enough to see a pause.
WINDOW_S = 60.0


class DeviceUsage:
    """The vitals of one engine, over all processes that it goes through."""

    def __init__(self) -> None:
        self._songs_before = 0
        self._audio_before = 0.0
        self._squeezes_before = 0
        # When, and the device's busy seconds by then; the first one is at least a window old once there are any.
        self._busy: deque[tuple[float, float]] = deque()
        self.vitals: EngineStats | None = None

    @property
    def songs(self) -> int:
        """Songs finished."""
        return self._songs_before + (self.vitals.songs_done if self.vitals else 0)

    @property
    def audio_s(self) -> float:
        """Seconds of audio finished."""
        return self._audio_before + (self.vitals.audio_s if self.vitals else 0.0)

    @property
    def squeezes(self) -> int:
        """Times that memory made a pack smaller, or work wait."""
        return self._squeezes_before + (self.vitals.squeezes if self.vitals else 0)

    @property
    def memory_share(self) -> float | None:
        """Memory in use, as a share of the engine's limit; None when one of the two is not known."""
        if self.vitals is None or self.vitals.memory_limit_gb <= 0:
            return None
        return self.vitals.memory_gb / self.vitals.memory_limit_gb

    def idle_share(self, now_s: float) -> float | None:
        """Share of the last minute in which the device had no work, 0 to 1. None while no process is ready.

        An engine without work may say nothing: silence counts as idle.
        """
        self._forget(now_s)
        if not self._busy or now_s <= self._busy[0][0]:
            return None
        since_s, before_s = self._busy[0]
        busy = (self._busy[-1][1] - before_s) / min(now_s - since_s, WINDOW_S)
        return min(1.0, max(0.0, 1.0 - busy))

    def process_ready(self, now_s: float) -> None:
        """A process is up; its device has done nothing yet."""
        self._busy.append((now_s, 0.0))

    def note(self, vitals: EngineStats, now_s: float) -> None:
        """Take in what the process says."""
        self.vitals = vitals
        self._busy.append((now_s, vitals.busy_s))
        self._forget(now_s)

    def process_gone(self) -> None:
        """Keep the totals of a process that ended; the next one counts from 0."""
        self._songs_before, self._audio_before, self._squeezes_before = self.songs, self.audio_s, self.squeezes
        self.vitals = None
        self._busy.clear()

    def _forget(self, now_s: float) -> None:
        """Drop what is older than the window, but for the last such entry: it is where the window begins."""
        while len(self._busy) > 1 and self._busy[1][0] <= now_s - WINDOW_S:
            self._busy.popleft()
