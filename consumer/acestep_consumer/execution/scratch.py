# SPDX-License-Identifier: Apache-2.0
"""Folders for work files: one of each worker's own, and in it one for each job, gone when the job is.

A worker that is killed cannot clean up; the next one does it. Each worker's folder holds a file that is locked as long
as its process lives, however that ends: the kernel drops the lock. A folder with such a file and no lock on it is a
dead worker's. Without the file a folder is somebody else's, whatever it is called.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

import structlog

from acestep_consumer.domain.errors import DiskFull

PREFIX: Final = "acestep-"
OWNER: Final = ".acestep-owner"

log = structlog.get_logger()


@contextmanager
def scratch_folder(root: Path, task_id: str) -> Iterator[Path]:
    """Make a new folder under ``root`` and remove it with all it holds, also on cancellation.

    Two runs of one task id get a folder each: a stopped renderer may still be writing into the older one.

    Raises:
        DiskFull: there is no room even for a folder.
    """
    with _on_disk():
        folder = Path(tempfile.mkdtemp(prefix=f"{task_id[:64]}-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_root(parent: Path | None) -> Iterator[Path]:
    """A folder of this worker's own under ``parent`` (None: the system's folder for such), gone with it.

    What killed workers have left there goes first.

    Raises:
        DiskFull: there is no room for it.
        OSError: it cannot be made.
    """
    place = parent or Path(tempfile.gettempdir())
    with _on_disk():
        place.mkdir(parents=True, exist_ok=True)
        sweep(place)
        root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    try:
        with _on_disk():
            mark = _mark(root)
        with mark:
            yield root
    finally:
        _remove(root)


def sweep(place: Path) -> None:
    """Remove the folders of workers that are gone. Everything else stays, and what cannot be removed too."""
    for root in place.glob(f"{PREFIX}*"):
        with suppress(OSError), _locked(root):
            log.info("scratch folder of a worker that was killed is removed", folder=str(root))
            _remove(root)


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if DiskFull.lies_behind(error):
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


def _mark(root: Path) -> BinaryIO:
    """Mark the folder as ours until the file is closed. It gets its name when it is locked, and not before."""
    unnamed = root / f"{OWNER}.new"
    mark = unnamed.open("xb")
    with suppress(OSError):  # a file system without locks: nobody can tell who lives, so nothing is ever swept
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(root / OWNER)
    return mark


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
