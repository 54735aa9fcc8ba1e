# SPDX-License-Identifier: Apache-2.0
"""A folder for one job's work files, gone when the job is."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder(root: Path, task_id: str) -> Iterator[Path]:
    """Make a new folder under ``root`` and remove it with all it holds, also on cancellation.

    Two runs of one task id get a folder each: a stopped renderer may still be writing into the older one.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{task_id[:64]}-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
