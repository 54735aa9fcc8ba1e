# SPDX-License-Identifier: Apache-2.0
"""Folder for temporary files: one of each worker's own, and in it one for each job, gone when the job is.

A worker that is killed cannot clean up; the next one does it. Each worker's folder holds a file that is locked as long
as its process lives, however that ends: the kernel drops the lock. A folder with such a file and no lock on it is a
dead worker's. Without the file a folder is somebody else's, whatever it is called.

Cleaners of temporary folders may remove either under a running worker: both are made again.
"""

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

import structlog

from acestep_consumer.domain.errors import DiskFull

PREFIX: Final = "acestep-"
OWNER: Final = ".acestep-owner"

log = structlog.get_logger()


class ScratchRoot:
    """A worker's folder below ``parent`` (None: the system's temporary folder). All methods block.

    A context manager: entering removes the folders of killed workers and makes this one's, leaving removes it. Raises
    ``DiskFull`` when there is no room, and ``OSError`` when it cannot be made.
    """

    def __init__(self, parent: Path | None) -> None:
        self._place = parent or Path(tempfile.gettempdir())
        self._own: _OwnFolder | None = None
        # Called by the event loop and by threads.
        self._making = threading.Lock()

    def __enter__(self) -> Self:
        with _on_disk():
            self._place.mkdir(parents=True, exist_ok=True)
            sweep(self._place)
        self.ensure()
        return self

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own.close()
            _remove(self._own.path)

    def ensure(self) -> Path:
        """Return the folder, made again with its mark where either is gone.

        Raises:
            DiskFull: there is no room for it.
            OSError: it cannot be made.
        """
        with self._making, _on_disk():
            before = self._own
            if before is not None and before.is_there():
                if not before.is_marked():
                    before.mark_again()
                    log.warning("scratch folder has lost its mark: marked again", folder=str(before.path))
                return before.path
            self._place.mkdir(parents=True, exist_ok=True)
            self._own = made = _OwnFolder.make(self._place)
            if before is not None:
                before.close()
                log.warning(
                    "scratch folder was removed: another one made", removed=str(before.path), folder=str(made.path)
                )
            return made.path

    def new_folder(self, task_id: str) -> Path:
        """Make a new folder for a job. Raises as ``ensure`` does.

        Two runs of one task id get a folder each: a stopped renderer may still be writing into the older one.
        """
        root = self.ensure()
        with _on_disk():
            return Path(tempfile.mkdtemp(prefix=f"{task_id[:64]}-", dir=root))


def sweep(place: Path) -> None:
    """Remove the folders of workers that are gone. Everything else stays, and what cannot be removed too."""
    for root in place.glob(f"{PREFIX}*"):
        with suppress(OSError), _locked(root):
            log.info("scratch folder of a worker that was killed is removed", folder=str(root))
            _remove(root)


@dataclass(slots=True)
class _OwnFolder:
    """A folder of this process, with the file that marks it, locked as long as it is open."""

    path: Path
    identity: tuple[int, int]
    mark: BinaryIO
    mark_path: Path

    @classmethod
    def make(cls, place: Path) -> Self:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        try:
            return cls(path, _identity(path), *_mark(path))
        except OSError:
            _remove(path)
            raise

    def is_there(self) -> bool:
        """Whether the path still leads to the folder that was made."""
        return _leads_to(self.path, self.identity)

    def is_marked(self) -> bool:
        found = os.fstat(self.mark.fileno())
        return _leads_to(self.mark_path, (found.st_dev, found.st_ino))

    def mark_again(self) -> None:
        self.mark.close()
        self.mark, self.mark_path = _mark(self.path)

    def close(self) -> None:
        self.mark.close()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat(follow_symlinks=False)
    return found.st_dev, found.st_ino


def _leads_to(path: Path, identity: tuple[int, int]) -> bool:
    try:
        return _identity(path) == identity
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if DiskFull.caused(error):
            raise DiskFull from error
        raise


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the lock of a worker's folder. Raises ``OSError``: it is no such folder, or its worker lives."""
    if root.is_symlink():
        raise NotADirectoryError(root)
    with (root / OWNER).open("r+b") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _mark(root: Path) -> tuple[BinaryIO, Path]:
    """Mark the folder as ours until the file is closed. It gets its name when it is locked, and not before."""
    unnamed = root / f"{OWNER}.new"
    unnamed.unlink(missing_ok=True)
    mark = unnamed.open("xb")
    with suppress(OSError):  # a file system without locks: nobody can tell who lives, so nothing is ever swept
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(root / OWNER)
        return mark, root / OWNER
    return mark, unnamed


def _remove(root: Path) -> None:
    """Remove a worker's folder, the mark last: what cannot be removed now is still known for what it is later."""
    with suppress(OSError):
        for entry in list(os.scandir(root)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != OWNER:
                Path(entry).unlink(missing_ok=True)
        if all(entry.name == OWNER for entry in os.scandir(root)):
            shutil.rmtree(root, ignore_errors=True)
