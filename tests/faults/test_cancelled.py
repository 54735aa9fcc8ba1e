# SPDX-License-Identifier: Apache-2.0
"""Cancel, in every state of a job: one ``cancelled`` event and no more, or none where it is too late."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE
from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running


@pytest.fixture
def settings(service_environment: dict[str, str]) -> dict[str, str]:
    return service_environment | {"ACESTEP_QUEUE_WORKERS": "1"}


async def test_a_running_job_stops_and_the_next_one_has_its_place(settings: dict[str, str], tmp_path: Path) -> None:
    url = settings["ACESTEP_AMQP_URL"]
    async with (
        running(WorkerProcess(tmp_path, settings, light=True)) as worker,
        EventRecorder(url) as recorder,
        Peer(url) as peer,
    ):
        await peer.submit(task_id="running", prompt=f"until={tmp_path / 'never'}")
        await peer.submit(task_id="next")
        await eventually(lambda: "started" in recorder.states("running"), WITHIN_S)
        await peer.cancel("running")
        await eventually(lambda: recorder.terminal("running") and recorder.terminal("next"), WITHIN_S)
        assert [recorder.states(task_id)[-1] for task_id in ("running", "next")] == ["cancelled", "completed"]
        assert len(recorder.terminal("running")) == 1
        assert await peer.ready(DEAD_LETTER) == 0
        assert not worker.log_lines(event="engine process is killed")


async def test_a_waiting_job_is_dropped_when_it_comes_up(settings: dict[str, str], tmp_path: Path) -> None:
    url, go = settings["ACESTEP_AMQP_URL"], tmp_path / "go"
    async with (
        running(WorkerProcess(tmp_path, settings, light=True)),
        EventRecorder(url) as recorder,
        Peer(url) as peer,
    ):
        await peer.submit(task_id="first", prompt=f"until={go}")
        await eventually(lambda: "started" in recorder.states("first"), WITHIN_S)
        await peer.submit(task_id="waiting")
        await peer.cancel("waiting")
        go.touch()
        await eventually(lambda: recorder.terminal("first") and recorder.terminal("waiting"), WITHIN_S)
        assert recorder.states("waiting") == ["cancelled"]


async def test_a_job_that_was_cancelled_while_no_worker_lived_is_dropped_by_the_next_one(
    settings: dict[str, str], tmp_path: Path
) -> None:
    url = settings["ACESTEP_AMQP_URL"]
    async with running(WorkerProcess(tmp_path, settings, light=True)):
        pass  # it has declared the queues
    async with EventRecorder(url) as recorder, Peer(url) as peer:
        await peer.submit(task_id="orphan")
        await peer.submit(task_id="wanted")
        await peer.cancel("orphan")
        assert await peer.ready(GENERATE) == 2
        async with running(WorkerProcess(tmp_path, settings, light=True)):
            await eventually(lambda: recorder.terminal("orphan") and recorder.terminal("wanted"), WITHIN_S)
        assert recorder.states("orphan") == ["cancelled"]
        assert recorder.states("wanted")[-1] == "completed"


async def test_a_job_that_ended_before_stays_as_it_ended(settings: dict[str, str], tmp_path: Path) -> None:
    url = settings["ACESTEP_AMQP_URL"]
    async with (
        running(WorkerProcess(tmp_path, settings, light=True)),
        EventRecorder(url) as recorder,
        Peer(url) as peer,
    ):
        await peer.submit(task_id="done")
        await eventually(lambda: recorder.terminal("done"), WITHIN_S)
        await peer.cancel("done")
        await peer.submit(task_id="done")
        await eventually(lambda: len(recorder.terminal("done")) == 2, WITHIN_S)
        assert len({event.body for event in recorder.terminal("done")}) == 1
        assert recorder.terminal("done")[0].state == "completed"


async def test_a_cancelled_id_can_be_used_again_a_second_later(settings: dict[str, str], tmp_path: Path) -> None:
    url = settings["ACESTEP_AMQP_URL"]
    async with (
        running(WorkerProcess(tmp_path, settings, light=True)),
        EventRecorder(url) as recorder,
        Peer(url) as peer,
    ):
        await peer.cancel("again")
        await asyncio.sleep(1.1)  # AMQP tells whole seconds
        body = b'{"task_id": "again", "prompt": "x", "audio_format": "wav"}'
        await peer.request(body, message_id="again", timestamp=datetime.now(UTC))
        await eventually(lambda: recorder.terminal("again"), WITHIN_S)
        assert recorder.states("again")[-1] == "completed"
