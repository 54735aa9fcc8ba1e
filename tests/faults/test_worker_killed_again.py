# SPDX-License-Identifier: Apache-2.0
"""A request that kills its worker each time, beside neighbours that do not: it fails in the end, and they are sung."""

from pathlib import Path

import pytest

from acestep_consumer.broker.topology import DEAD_LETTER
from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

NEIGHBOURS = ("n0", "n1")
TRIES = 3


def started(recorder: EventRecorder, task_id: str) -> int:
    return recorder.states(task_id).count("started")


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_killer_is_dead_lettered_after_its_last_try_alone_and_no_neighbour_with_it(
    kind: str, service_environment: dict[str, str], tmp_path: Path
) -> None:
    url = service_environment["ACESTEP_AMQP_URL"]
    settings = service_environment | {
        "ACESTEP_QUEUE_TYPE": kind,
        "ACESTEP_QUEUE_WORKERS": "4",
        "ACESTEP_MAX_ATTEMPTS": str(TRIES),
    }
    async with (
        running(WorkerProcess(tmp_path, settings, light=True)) as first,
        EventRecorder(url) as recorder,
        Peer(url) as peer,
    ):
        await peer.submit(task_id="killer", prompt=f"until={tmp_path / 'never'}")
        for task_id in NEIGHBOURS:
            await peer.submit(task_id=task_id, prompt="takes=3")
        await eventually(lambda: all(started(recorder, task_id) for task_id in ("killer", *NEIGHBOURS)), WITHIN_S)
        first.kill()
        for number in range(2, TRIES + 1):
            async with running(WorkerProcess(tmp_path, settings, light=True)) as worker:
                await eventually(lambda: started(recorder, "killer") == number, WITHIN_S)  # noqa: B023 - awaited at once
                worker.kill()
        async with running(WorkerProcess(tmp_path, settings, light=True)):
            await eventually(lambda: all(map(recorder.terminal, ("killer", *NEIGHBOURS))), WITHIN_S)
        (failed,) = recorder.terminal("killer")
        assert failed.data["error"]["code"] == "engine_crashed"
        assert failed.data["error"]["attempts"] == TRIES
        assert [state for task_id in NEIGHBOURS for state in recorder.states(task_id)[-1:]] == ["completed"] * 2
        assert started(recorder, "killer") == TRIES
        assert (await peer.take(DEAD_LETTER)).message_id == "killer"
        assert await peer.ready(DEAD_LETTER) == 0


@pytest.mark.parametrize("kind", ["classic", pytest.param("quorum", marks=pytest.mark.broker_versions)])
async def test_a_job_that_is_handed_back_again_and_again_is_not_blamed(
    kind: str, service_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    url = service_environment["ACESTEP_AMQP_URL"]
    settings = service_environment | {"ACESTEP_QUEUE_TYPE": kind, "ACESTEP_MAX_ATTEMPTS": "2"}
    arguments = ("--grace", "0")
    async with running(WorkerProcess(tmp_path, settings, light=True)):
        pass  # it has declared the queues
    async with EventRecorder(url) as recorder, Peer(url) as peer:
        for number in range(1, 5):
            async with running(WorkerProcess(tmp_path, settings, light=True, arguments=arguments)):
                if number == 1:
                    await peer.submit(task_id="song", prompt=f"until={go}")
                await eventually(lambda: started(recorder, "song") == number, WITHIN_S)  # noqa: B023 - awaited at once
                if number == 4:
                    go.touch()
                    await eventually(lambda: recorder.terminal("song"), WITHIN_S)
        (told,) = recorder.terminal("song")
        assert (told.state, told.data["attempt"]) == ("completed", 4)
