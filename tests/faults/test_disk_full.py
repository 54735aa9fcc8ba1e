# SPDX-License-Identifier: Apache-2.0
"""The scratch disk of a real worker fills up: jobs go back, none fails, and all are done when there is room again."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from acestep_consumer.broker.topology import GENERATE
from tests.support.broker import Peer, until
from tests.support.event_recorder import EventRecorder
from tests.support.object_store import ObjectStore
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

DISK_MIB = 24
# A song of 10 s as 32-bit WAV has 3.7 MiB, and the input is as large.
LEFT_MIB = 2
INPUT_BYTES = 6 << 20


class SmallDisk:
    """A file system of its own, and the ballast that fills it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave next to nothing free."""
        free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
        self._ballast.write_bytes(bytes(max(0, free - (LEFT_MIB << 20))))

    def allow_files(self, count: int) -> None:
        """Bound the files and folders that may be on it, its root among them."""
        subprocess.run(["mount", "-o", f"remount,nr_inodes={count}", str(self.folder)], check=True)

    def make_room(self) -> None:
        """Give it all back."""
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A small tmpfs: only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield SmallDisk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def environment(service_environment: dict[str, str], tiny_checkpoints: Path, disk: SmallDisk) -> dict[str, str]:
    return service_environment | {
        "ACESTEP_CHECKPOINT_DIR": str(tiny_checkpoints),
        "ACESTEP_INIT_LLM": "false",
        "ACESTEP_SCRATCH_DIR": str(disk.folder),
    }


async def room(worker: WorkerProcess) -> bool | None:
    """What the worker's page of readiness says about its disk; None while there is no page."""
    _, page = await asyncio.to_thread(worker.get, "/readyz")
    return None if page is None else page["checks"]["disk"]


async def has_stopped(worker: WorkerProcess, peer: Peer) -> bool:
    return await room(worker) is False and await peer.ready(GENERATE) == 1


@pytest.mark.parametrize("writer", ["engine", "input"])
async def test_a_job_whose_files_find_no_room_goes_back_and_is_done_when_there_is_room(
    environment: dict[str, str], tmp_path: Path, disk: SmallDisk, writer: str
) -> None:
    """The mark is 0: only the file that cannot be written tells of the full disk."""
    url, object_store = environment["ACESTEP_AMQP_URL"], ObjectStore.of(environment)
    fields = {"audio_format": "wav32", "inference_steps": 1}
    if writer == "input":
        object_store.client.put_object(
            Bucket=object_store.bucket, Key=f"{object_store.prefix}/in.wav", Body=bytes(INPUT_BYTES)
        )
        fields["reference_audio_path"] = f"s3://{object_store.bucket}/{object_store.prefix}/in.wav"
    through = environment | {"ACESTEP_SCRATCH_MIN_GB": "0"}
    async with running(WorkerProcess(tmp_path, through)) as worker, Peer(url) as peer, EventRecorder(url) as recorder:
        disk.fill()
        await peer.submit(task_id="song", **fields)
        await until(lambda: has_stopped(worker, peer), "the message back in the queue", WITHIN_S)
        (line,) = worker.log_lines(event="scratch disk is full: no new jobs")
        assert line["folder"].startswith(str(disk.folder))
        assert line["free_bytes"] <= DISK_MIB << 20
        assert recorder.terminal("song") == []
        disk.make_room()
        await eventually(lambda: recorder.terminal("song"), WITHIN_S)
        assert await room(worker)
        assert worker.log_lines(event="scratch disk has room again")
        (end,) = recorder.terminal("song")
        assert await peer.ready(GENERATE) == 0
    # What was sent as audio is none: its own fault, and found only once there was room to fetch it.
    assert end.state == ("completed" if writer == "engine" else "failed")
    assert writer == "engine" or end.data["error"]["code"] == "input_unreadable"


async def test_below_the_mark_at_the_start_a_worker_takes_nothing_until_there_is_room(
    environment: dict[str, str], tmp_path: Path, disk: SmallDisk
) -> None:
    """The default asks for 1 GB, which is a quarter of this disk."""
    disk.fill()
    url = environment["ACESTEP_AMQP_URL"]
    async with running(WorkerProcess(tmp_path, environment, light=True, await_ready=False)) as worker:
        await eventually(lambda: worker.log_lines(event="ready"), WITHIN_S)
        async with Peer(url) as peer, EventRecorder(url) as recorder:
            await peer.submit(task_id="song")
            for _ in range(10):
                assert await has_stopped(worker, peer)
                await asyncio.sleep(0.1)
            disk.make_room()
            await eventually(lambda: recorder.states("song") == ["started", "completed"], WITHIN_S)
            assert await room(worker)


async def test_without_room_even_for_a_folder_a_worker_starts_and_waits(
    environment: dict[str, str], tmp_path: Path, disk: SmallDisk
) -> None:
    disk.allow_files(2)
    (disk.folder / "other").touch()
    async with running(WorkerProcess(tmp_path, environment, light=True, await_ready=False)) as worker:
        await eventually(lambda: worker.log_lines(event="scratch disk is full: waiting for space"), WITHIN_S)
        assert await room(worker) is False
        disk.allow_files(4096)
        await eventually(lambda: worker.log_lines(event="ready"), WITHIN_S)
