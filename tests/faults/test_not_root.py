# SPDX-License-Identifier: Apache-2.0
"""A worker whose user is not root, owns nothing but its scratch folder and has no home folder of its own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

NOBODY = 65534
# It may read everything: this checkout and its Python may be closed to other users.
MAY_READ = "+dac_read_search"
DROP = [
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"),
    *(f"--inh-caps=-all,{MAY_READ}", f"--ambient-caps=-all,{MAY_READ}", f"--bounding-set=-all,{MAY_READ}"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of that user's; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp())
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


def owner(process: int) -> int:
    return Path(f"/proc/{process}").stat().st_uid


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests show it: they are not run by root")
async def test_a_worker_needs_no_root(service_environment: dict[str, str], folder: Path) -> None:
    worker = WorkerProcess(folder, service_environment | {"HOME": "/nonexistent"}, light=True)
    worker._command = [*DROP, *worker._command]
    url = service_environment["ACESTEP_AMQP_URL"]
    async with running(worker), EventRecorder(url) as seen, Peer(url) as peer:
        assert owner(worker.children()[0]) == NOBODY
        await peer.submit(task_id="song")
        await eventually(lambda: seen.terminal("song"), WITHIN_S)
        assert [end.state for end in seen.terminal("song")] == ["completed"]
