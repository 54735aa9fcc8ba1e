# SPDX-License-Identifier: Apache-2.0
"""Busy time of the device, and the limit on how far the CPU may run ahead of it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceClock:
    """Times units of work on a device. One unit at most is launched in advance, so that progress is never late."""

    def __init__(self, device: torch.device) -> None:
        self._timed_by_events = device.type == "cuda"
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self.busy_s = 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Time the work launched inside. Waits until the unit before it is done."""
        if not self._timed_by_events:
            started = time.perf_counter()
            yield
            self.busy_s += time.perf_counter() - started
            return
        start, end = _event(), _event()
        start.record()
        try:
            yield
        finally:
            end.record()
            self._under_way.append((start, end))
            self._settle(leave=1)

    def finish(self) -> None:
        """Wait until all launched work is done."""
        self._settle(leave=0)

    def _settle(self, leave: int) -> None:
        while len(self._under_way) > leave:
            start, end = self._under_way.popleft()
            end.synchronize()
            self.busy_s += start.elapsed_time(end) / 1000


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
