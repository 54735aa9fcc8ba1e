# SPDX-License-Identifier: Apache-2.0
"""Guard of the scratch disk: no new jobs while it is full, and no job fails because of it.

The disk counts as full in two cases: its free space is below a minimum, which is checked every few seconds and before
each job; or a file could not be written, by us or by an engine. Then the message of that job is requeued.
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
FIRST_PAUSE_S: Final = 5.0
MAX_PAUSE_S: Final = 300.0
"""Between a failed write and the next job. It doubles each time: a job may be too large for the whole disk."""

_GIB: Final = 1 << 30
_MIN_FILES: Final = 256
_RESUME_FACTOR: Final = 1.1
_PROBE_BYTES: Final = 64 << 20

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """Size and free space of a file system, bytes. Where few more files can be created, nothing counts as free."""

    total: int
    free: int

    @classmethod
    def of(cls, folder: Path) -> "DiskSpace":
        """Ask the file system of ``folder``. Raises ``OSError``."""
        found = os.statvfs(folder)
        # File systems without a fixed number of files report 0 of them.
        usable = found.f_files == 0 or found.f_favail >= _MIN_FILES
        return cls(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize if usable else 0)


class DiskGuard:
    """Tracks whether the scratch disk is full.

    Args:
        folder: where jobs have their folders.
        min_gb: returns the GiB that must be free. A quarter of the disk is enough in any case.
        on_change: called with True when the disk becomes full, and with False when it no longer is.
        first_pause_s: pause after the first failed write, seconds.
    """

    def __init__(
        self,
        folder: Path,
        min_gb: Callable[[], float],
        on_change: Callable[[bool], Awaitable[None]],
        *,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._folder = folder
        self._min_gb = min_gb
        self._on_change = on_change
        self._first_pause_s = self._pause_s = first_pause_s
        self._paused_until = 0.0
        self._changing = asyncio.Lock()
        self.full = False

    async def run(self) -> None:
        """Check again and again, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.check()
            except Exception:
                # This task is what resumes consuming after a full disk: no error may end it.
                log.exception("scratch disk could not be checked")

    async def check(self) -> None:
        """Compare the free space with the minimum, and report a change."""
        async with self._changing:
            space = DiskSpace.of(self._folder)
            minimum = self._minimum(space)
            if not self.full and space.free < minimum:
                await self._change(space, full=True, reason="less is free than ACESTEP_SCRATCH_MIN_GB")
            elif self.full and space.free >= _RESUME_FACTOR * minimum and await self._may_write():
                await self._change(space, full=False)

    async def write_failed(self) -> None:
        """Treat the disk as full, however much the file system reports as free: a quota may be exceeded."""
        async with self._changing:
            self._paused_until = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            if not self.full:
                await self._change(DiskSpace.of(self._folder), full=True, reason="a job's file could not be written")

    @asynccontextmanager
    async def guarding(self) -> AsyncIterator[None]:
        """Raise ``DiskFull`` in place of any error that a full disk caused; by then no new jobs are taken."""
        try:
            yield
        except Exception as error:
            if not DiskFull.lies_behind(error):
                raise
            await self.write_failed()
            raise DiskFull from error

    def write_succeeded(self) -> None:
        """Reset the pause: a job's files could be written."""
        self._pause_s = self._first_pause_s

    async def _change(self, space: DiskSpace, *, full: bool, reason: str = "") -> None:
        self.full = full
        numbers = {"folder": str(self._folder), "free_bytes": space.free, "needed_bytes": self._minimum(space)}
        if full:
            log.error("scratch disk is full: no new jobs", **numbers, reason=reason)
        else:
            log.info("scratch disk has room again", **numbers)
        await self._on_change(full)

    def _minimum(self, space: DiskSpace) -> int:
        return int(min(self._min_gb() * _GIB, space.total / 4))

    async def _may_write(self) -> bool:
        return time.monotonic() >= self._paused_until and await asyncio.to_thread(_can_write, self._folder)


class GuardedInputs:
    """``ports.Inputs`` under a ``DiskGuard``."""

    def __init__(self, inputs: Inputs, disk: DiskGuard) -> None:
        self._inputs = inputs
        self._disk = disk

    async def fetch(self, job: Job, folder: Path) -> Sources:
        """Copy the job's inputs into ``folder``. Raises ``DiskFull``, and the errors of the inputs."""
        await self._disk.check()
        async with self._disk.guarding():
            return await self._inputs.fetch(job, folder)


class GuardedRenderer:
    """A ``ports.Renderer`` under a ``DiskGuard``."""

    def __init__(self, renderer: Renderer, disk: DiskGuard) -> None:
        self._renderer = renderer
        self._disk = disk

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Render the songs into ``folder``. Raises ``DiskFull``, and the errors of the renderer."""
        async with self._disk.guarding():
            rendering = await self._renderer.render(job, plan, sources, folder, report)
        self._disk.write_succeeded()
        return rendering

    async def tokenize_audio(self, job: Job, sources: Sources) -> TokenizedSource:
        """Turn source audio into audio codes; this writes nothing."""
        return await self._renderer.tokenize_audio(job, sources)


def _can_write(folder: Path) -> bool:
    """Whether space can be allocated; statvfs knows nothing of quotas."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, min(_PROBE_BYTES, DiskSpace.of(folder).free // 2) or 1)
        return True
    return False
