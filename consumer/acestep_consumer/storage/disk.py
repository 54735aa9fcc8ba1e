# SPDX-License-Identifier: Apache-2.0
"""The disk under the scratch folder: nothing new is taken while it has no room, and no job is blamed for that.

Two things tell of it. Free space below a mark, which is looked at every few seconds and before each job; and a file
that could not be written, by us or by an engine: then this job's message goes back to the queue.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from acestep_consumer.domain.errors import DiskFull
from acestep_consumer.domain.job import Job, Plan, Rendering, Sources, TokenizedSource
from acestep_consumer.domain.ports import Inputs, Renderer, Report

POLL_S: Final = 2.0
FIRST_REST_S: Final = 5.0
LAST_REST_S: Final = 300.0
"""Between a file that could not be written and the next job. It doubles: a job may be too large for the whole disk."""

_GIB: Final = 1 << 30
_LEAST_FILES: Final = 256
_RELIEF: Final = 1.1
_PROBE_BYTES: Final = 64 << 20

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """What a file system has, in bytes. Without room for some more files, none of its bytes are of use."""

    total: int
    free: int

    @classmethod
    def of(cls, folder: Path) -> "DiskSpace":
        """Ask the file system that ``folder`` lies on. Raises ``OSError``."""
        found = os.statvfs(folder)
        # Some file systems make files as needed, and say 0 to how many there may be.
        usable = found.f_files == 0 or found.f_favail >= _LEAST_FILES
        return cls(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize if usable else 0)


class DiskGuard:
    """Knows whether there is room for another job.

    Args:
        folder: where jobs have their folders.
        min_gb: GiB that must be free, asked at each look. More than a quarter of the disk is never asked for.
        on_change: told when there is no room (True), and when there is again (False).
    """

    def __init__(
        self,
        folder: Path,
        min_gb: Callable[[], float],
        on_change: Callable[[bool], Awaitable[None]],
        *,
        first_rest_s: float = FIRST_REST_S,
    ) -> None:
        self._folder = folder
        self._min_gb = min_gb
        self._on_change = on_change
        self._first_rest_s = self._rest_s = first_rest_s
        self._resting_until = 0.0
        self._changing = asyncio.Lock()
        self.full = False

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.look()
            except Exception:
                # Who takes jobs again after a full disk is this task: it must outlive what nobody foresaw.
                log.exception("scratch disk could not be looked at")

    async def look(self) -> None:
        """See how much is free, and tell of a change."""
        async with self._changing:
            space = DiskSpace.of(self._folder)
            mark = self._mark(space)
            if not self.full and space.free < mark:
                await self._change(space, full=True, reason="less is free than ACESTEP_SCRATCH_MIN_GB")
            elif self.full and space.free >= _RELIEF * mark and await self._may_write():
                await self._change(space, full=False)

    async def found_full(self) -> None:
        """Act on a file that could not be written, whatever the file system says is free: a quota may be full."""
        async with self._changing:
            self._resting_until = time.monotonic() + self._rest_s
            self._rest_s = min(2 * self._rest_s, LAST_REST_S)
            if not self.full:
                await self._change(DiskSpace.of(self._folder), full=True, reason="a job's file could not be written")

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Turn any error that a full disk lies behind into ``DiskFull``; by then nothing new is taken."""
        try:
            yield
        except Exception as error:
            if not DiskFull.lies_behind(error):
                raise
            await self.found_full()
            raise DiskFull from error

    def wrote(self) -> None:
        """Note that a job's files could be written."""
        self._rest_s = self._first_rest_s

    async def _change(self, space: DiskSpace, *, full: bool, reason: str = "") -> None:
        self.full = full
        numbers = {"folder": str(self._folder), "free_bytes": space.free, "needed_bytes": self._mark(space)}
        if full:
            log.error("scratch disk is full: nothing new is taken", **numbers, reason=reason)
        else:
            log.info("scratch disk has room again", **numbers)
        await self._on_change(full)

    def _mark(self, space: DiskSpace) -> int:
        return int(min(self._min_gb() * _GIB, space.total / 4))

    async def _may_write(self) -> bool:
        return time.monotonic() >= self._resting_until and await asyncio.to_thread(_can_write, self._folder)


class GuardedInputs:
    """``ports.Inputs`` on a disk that may be full."""

    def __init__(self, inputs: Inputs, disk: DiskGuard) -> None:
        self._inputs = inputs
        self._disk = disk

    async def fetch(self, job: Job, folder: Path) -> Sources:
        """Copy the job's inputs into ``folder``. Raises ``DiskFull`` and what the inputs raise."""
        await self._disk.look()
        async with self._disk.watching():
            return await self._inputs.fetch(job, folder)


class GuardedRenderer:
    """A ``ports.Renderer`` on a disk that may be full."""

    def __init__(self, renderer: Renderer, disk: DiskGuard) -> None:
        self._renderer = renderer
        self._disk = disk

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Make the songs and write them into ``folder``. Raises ``DiskFull`` and what the renderer raises."""
        async with self._disk.watching():
            rendering = await self._renderer.render(job, plan, sources, folder, report)
        self._disk.wrote()
        return rendering

    async def tokenize_audio(self, job: Job, sources: Sources) -> TokenizedSource:
        """Turn source audio into audio codes; nothing is written for that."""
        return await self._renderer.tokenize_audio(job, sources)


def _can_write(folder: Path) -> bool:
    """Whether some space can be had; statvfs knows nothing of quotas."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, min(_PROBE_BYTES, DiskSpace.of(folder).free // 2) or 1)
        return True
    return False
