# SPDX-License-Identifier: Apache-2.0
"""An engine process that grows past a limit is killed and replaced, and its jobs are done by the next one.

The limit is the worker's own, or the kernel's: that of a container or, without one, the machine's memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.engines import render, supervised

pytestmark = pytest.mark.usefixtures("fresh_processes", "quick_restarts")  # a fork holds what was imported for all


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group whose processes the kernel kills at this limit."""
    root = Path("/sys/fs/cgroup")
    first_version = (root / "memory").is_dir()
    group = (root / "memory" if first_version else root) / f"acestep-test-{uuid4().hex}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first_version else "memory.max")).write_text(str(limit_bytes))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    group.rmdir()


def children() -> list[str]:
    """The process ids of this process's children."""
    lists = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [child for listed in lists for child in listed.read_text().split()]


async def test_a_process_that_the_kernel_kills_for_memory_is_replaced(tmp_path: Path) -> None:
    others = set(children())
    with memory_group(200 << 20) as group:
        async with supervised() as engine:
            (process,) = set(children()) - others
            (group / "cgroup.procs").write_text(process)
            rendering = await render(engine, tmp_path, f"swell-once {tmp_path / 'mark'} 300")
            assert rendering.tracks
            assert engine.restarts == 1


async def test_a_process_that_grows_past_its_limit_is_replaced(tmp_path: Path) -> None:
    async with supervised(ram_bytes=200 << 20) as engine:
        rendering = await render(engine, tmp_path, f"swell-once {tmp_path / 'mark'} 300")
        assert rendering.tracks
        assert engine.restarts == 1
