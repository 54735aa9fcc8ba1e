# SPDX-License-Identifier: Apache-2.0
"""Device usage of one engine: totals over all its processes, and the idle share of the last minute.

It has no clock: callers pass the time, in seconds of any monotonic clock.
"""

from collections import deque

from acestep_consumer.engine.messages import EngineStats, LmStats

# Long enough to span several batches, short enough to show a pause.
WINDOW_S = 60.0


class DeviceUsage:
    """Totals of one engine's stats. ``stats`` are the latest of its current process; None: none yet."""

    def __init__(self) -> None:
        self._audio_before = 0.0
        self._reductions_before = 0
        # (time, busy seconds until then); the first entry is the latest of those older than the window, if any.
        self._busy: deque[tuple[float, float]] = deque()
        self.stats: EngineStats | None = None
        self.lm: LmStats | None = None
        """The language model's, in place of ``stats``."""

    @property
    def audio_s(self) -> float:
        """Seconds of audio finished."""
        return self._audio_before + (self.stats.audio_s if self.stats else 0.0)

    @property
    def reductions(self) -> int:
        """Times that a lack of memory made a batch smaller, or a job wait."""
        return self._reductions_before + (self.stats.reductions if self.stats else 0)

    @property
    def memory_share(self) -> float | None:
        """Memory in use, as a share of the engine's limit; None when one of the two is not known."""
        if self.stats is None or self.stats.memory_limit_gb <= 0:
            return None
        return self.stats.memory_gb / self.stats.memory_limit_gb

    def idle_share(self, now_s: float) -> float | None:
        """Share of the last minute in which the device had no work, 0 to 1. None while no process is ready.

        An idle engine sends no stats: a time without stats counts as idle.
        """
        self._drop_old(now_s)
        if not self._busy or now_s <= self._busy[0][0]:
            return None
        since_s, before_s = self._busy[0]
        busy = (self._busy[-1][1] - before_s) / min(now_s - since_s, WINDOW_S)
        return min(1.0, max(0.0, 1.0 - busy))

    def process_ready(self, now_s: float) -> None:
        """Note that a process is ready; its device has done nothing yet."""
        self._busy.append((now_s, 0.0))

    def note(self, stats: EngineStats | LmStats, now_s: float) -> None:
        """Note the stats of the current process."""
        if isinstance(stats, LmStats):
            self.lm = stats
            return
        self.stats = stats
        self._busy.append((now_s, stats.busy_s))
        self._drop_old(now_s)

    def process_gone(self) -> None:
        """Keep the totals of a process that ended; the next one counts from 0."""
        self._audio_before, self._reductions_before = self.audio_s, self.reductions
        self.stats = self.lm = None
        self._busy.clear()

    def _drop_old(self, now_s: float) -> None:
        """Drop entries older than the window, except the last of them: it is where the window begins."""
        while len(self._busy) > 1 and self._busy[1][0] <= now_s - WINDOW_S:
            self._busy.popleft()
