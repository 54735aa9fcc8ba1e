# SPDX-License-Identifier: Apache-2.0
"""Guard of the scratch disk: no new jobs while it is full or its folder cannot be used, and no job fails of that.

The disk counts as full in two cases: its free space is below a minimum, which is checked every few seconds and before
each job; or a file could not be written, by us or by an engine. Then the message of that job is requeued. So is that of
a job whose folder was removed.
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

import structlog

from acestep_consumer.domain.errors import Cancelled, DiskFull, Interrupted, Refused, ScratchLost
from acestep_consumer.domain.job import Job, Plan, Rendering, Sources, TokenizedSource
from acestep_consumer.domain.ports import Inputs, Renderer, Report

T = TypeVar("T")

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


class Scratch(Protocol):
    """The folder in which jobs have theirs: ``execution.scratch.ScratchRoot``. Its methods block."""

    def ensure(self) -> Path:
        """Return the folder, made again if it is gone. Raises ``DiskFull``, ``OSError``."""

    def new_folder(self, task_id: str) -> Path:
        """Make a new folder in it. Raises ``DiskFull``, ``OSError``."""


class DiskGuard:
    """Tracks whether the scratch disk is full, or its folder unusable, and gives jobs their folders.

    Args:
        scratch: where jobs have their folders.
        min_gb: GiB that must be free; a reload may change it. A quarter of the disk is enough in any case.
        on_change: called with True when the disk becomes full, and with False when it no longer is.
        first_pause_s: pause after the first failed write, seconds.
    """

    def __init__(
        self,
        scratch: Scratch,
        min_gb: float,
        on_change: Callable[[bool], Awaitable[None]],
        *,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._scratch = scratch
        self.min_gb = min_gb
        self._on_change = on_change
        self._first_pause_s = self._pause_s = first_pause_s
        self._paused_until = 0.0
        self._changing = asyncio.Lock()
        # One thread, so that what it is given next runs after all removals before.
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="scratch")
        self.full = False
        """Whether no new jobs are taken: the disk is full, or the folder cannot be used."""

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
        """Compare the free space with the minimum, and report a change. A folder that is gone is made again."""
        async with self._changing:
            try:
                folder, space = await asyncio.to_thread(self._measure)
                if not self.full and space.free < self._minimum(space):
                    folder, space = await self._after_removals(self._measure)
            except (OSError, DiskFull) as error:
                await self._unusable(error)
                return
            minimum = self._minimum(space)
            if not self.full and space.free < minimum:
                await self._change(folder, space, full=True, reason="less is free than ACESTEP_SCRATCH_MIN_GB")
            elif self.full and space.free >= _RESUME_FACTOR * minimum and await self._may_write(folder):
                await self._change(folder, space, full=False)

    async def write_failed(self) -> None:
        """Treat the disk as full, however much the file system reports as free: a quota may be exceeded."""
        async with self._changing:
            self._paused_until = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            if self.full:
                return
            try:
                folder, space = await asyncio.to_thread(self._measure)
            except (OSError, DiskFull) as error:
                await self._unusable(error)
            else:
                await self._change(folder, space, full=True, reason="a job's file could not be written")

    @asynccontextmanager
    async def job_folder(self, task_id: str) -> AsyncIterator[Path]:
        """Make a new folder for a job and remove it with all it holds, also on cancellation.

        Nobody waits for the removal: the next job's check of the free space does, where it matters.

        Raises:
            DiskFull: there is no room even for a folder.
            ScratchLost: it cannot be made; or it was removed, and the job failed of that.
        """
        try:
            async with self.guarding():
                folder, space = await self._new_folder(task_id)
        except FileNotFoundError as error:  # removed in the moment between, and made again for the next job
            raise ScratchLost from error
        except OSError as error:
            log.error("a job's folder cannot be made", task_id=task_id, reason=str(error))  # noqa: TRY400 - a state of the machine, no bug: its text is enough
            await self.write_failed()
            raise ScratchLost from error
        try:
            if self.full or space.free < self._minimum(space):
                await self.check()
            yield folder
        except (Cancelled, Interrupted, Refused):
            raise
        except Exception as error:
            if folder.is_dir():
                raise
            log.warning("job's folder was removed: its message is requeued", task_id=task_id, folder=str(folder))
            raise ScratchLost from error
        finally:
            self._remover.submit(shutil.rmtree, folder, ignore_errors=True)

    @asynccontextmanager
    async def guarding(self) -> AsyncIterator[None]:
        """Raise ``DiskFull`` in place of any error that a full disk caused; by then no new jobs are taken."""
        try:
            yield
        except Exception as error:
            if not DiskFull.caused(error):
                raise
            await self.write_failed()
            raise DiskFull from error

    def write_succeeded(self) -> None:
        """Reset the pause: a job's files could be written."""
        self._pause_s = self._first_pause_s

    async def _new_folder(self, task_id: str) -> tuple[Path, DiskSpace]:
        """Make a folder and measure the disk, in one thread, since a network file system may take its time.

        On cancellation, no folder is left.
        """
        making = asyncio.get_running_loop().run_in_executor(None, self._make_folder, task_id)
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            await asyncio.wait({making})
            if making.exception() is None:
                self._remover.submit(shutil.rmtree, making.result()[0], ignore_errors=True)
            raise

    def _make_folder(self, task_id: str) -> tuple[Path, DiskSpace]:
        _, space = self._measure()
        return self._scratch.new_folder(task_id), space

    async def _after_removals(self, call: Callable[[], T]) -> T:
        """Return what ``call`` returns in a thread, once the folders of all jobs that have ended are removed."""
        return await asyncio.get_running_loop().run_in_executor(self._remover, call)

    def _measure(self) -> tuple[Path, DiskSpace]:
        folder = self._scratch.ensure()
        return folder, DiskSpace.of(folder)

    async def _unusable(self, error: Exception) -> None:
        """Take no more jobs: there is no folder for them."""
        if not self.full:
            self.full = True
            log.error("scratch folder cannot be used: no new jobs", reason=str(error))
            await self._on_change(True)  # noqa: FBT003 - a callback's one argument

    async def _change(self, folder: Path, space: DiskSpace, *, full: bool, reason: str = "") -> None:
        self.full = full
        numbers = {"folder": str(folder), "free_bytes": space.free, "needed_bytes": self._minimum(space)}
        if full:
            log.error("scratch disk is full: no new jobs", **numbers, reason=reason)
        else:
            log.info("scratch disk has room again", **numbers)
        await self._on_change(full)

    def _minimum(self, space: DiskSpace) -> int:
        return int(min(self.min_gb * _GIB, space.total / 4))

    async def _may_write(self, folder: Path) -> bool:
        return time.monotonic() >= self._paused_until and await asyncio.to_thread(_can_write, folder)


class GuardedInputs:
    """``ports.Inputs`` under a ``DiskGuard``."""

    def __init__(self, inputs: Inputs, disk: DiskGuard) -> None:
        self._inputs = inputs
        self._disk = disk

    async def fetch(self, job: Job, folder: Path) -> Sources:
        """Copy the job's inputs into ``folder``. Raises ``DiskFull``, and the errors of the inputs."""
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
