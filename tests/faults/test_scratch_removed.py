# SPDX-License-Identifier: Apache-2.0
"""The scratch folder vanishes under a running worker: it is made again, or the worker is not ready; no job fails."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from acestep_consumer.broker.topology import GENERATE
from tests.support.broker import Peer, until
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

MARK = ".acestep-owner"


@dataclass
class Scenario:
    """A worker whose scratch folder is in ``place``, which a test may remove."""

    worker: WorkerProcess
    peer: Peer
    recorder: EventRecorder
    place: Path

    @property
    def roots(self) -> list[Path]:
        return list(self.place.glob("scratch/acestep-*"))

    async def has_room(self) -> bool | None:
        """What the page of readiness says of the disk."""
        _, page = await asyncio.to_thread(self.worker.get, "/readyz")
        return None if page is None else page["checks"]["disk"]

    async def ends(self, task_id: str) -> str:
        """How the job ended, once."""
        await eventually(lambda: self.recorder.terminal(task_id), WITHIN_S)
        (end,) = self.recorder.terminal(task_id)
        return end.state


@pytest.fixture
async def scenario(service_environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Scenario]:
    url, place = service_environment["ACESTEP_AMQP_URL"], tmp_path / "place"
    settings = service_environment | {"ACESTEP_SCRATCH_DIR": str(place / "scratch")}
    worker = WorkerProcess(tmp_path, settings, light=True)
    async with running(worker), Peer(url) as peer, EventRecorder(url) as recorder:
        yield Scenario(worker, peer, recorder, place)
    assert list(place.glob("scratch/*")) == [], "it is gone with the worker"


async def test_an_idle_worker_makes_its_folder_again_with_its_mark(scenario: Scenario) -> None:
    (before,) = scenario.roots
    shutil.rmtree(before)
    await scenario.peer.submit(task_id="song")
    assert await scenario.ends("song") == "completed"
    assert scenario.recorder.states("song").count("started") == 1
    (after,) = scenario.roots
    assert (after / MARK).exists()
    assert await scenario.has_room()
    assert scenario.worker.log_lines(event="scratch folder was removed: another one made", removed=str(before))


async def test_a_running_job_whose_folder_is_removed_goes_back_and_is_done(scenario: Scenario, tmp_path: Path) -> None:
    go = tmp_path / "go"
    await scenario.peer.submit(task_id="song", prompt=f"until={go}")
    await eventually(lambda: scenario.recorder.states("song") == ["started"], WITHIN_S)
    shutil.rmtree(scenario.place)
    go.touch()
    assert await scenario.ends("song") == "completed"
    assert scenario.recorder.states("song").count("started") == 2
    assert len(scenario.roots) == 1


async def test_a_folder_that_cannot_be_made_again_makes_the_worker_unready_and_its_messages_wait(
    scenario: Scenario,
) -> None:
    shutil.rmtree(scenario.place)
    scenario.place.touch()
    await scenario.peer.submit(task_id="song")

    async def waits() -> bool:
        return await scenario.has_room() is False and await scenario.peer.ready(GENERATE) == 1

    await until(waits, "unready, with the message in the queue", WITHIN_S)
    for _ in range(10):
        assert await waits()
        await asyncio.sleep(0.1)
    assert scenario.recorder.terminal("song") == []
    assert scenario.recorder.states("song").count("started") <= 1, "it does not bounce"
    scenario.place.unlink()
    assert await scenario.ends("song") == "completed"
    assert await scenario.has_room()
