# SPDX-License-Identifier: Apache-2.0
"""Records of attempts go when their message has ended, however often it was tried and whoever ends it."""

from pathlib import Path

from tests.support.broker import Peer, until
from tests.support.event_recorder import EventRecorder
from tests.support.object_store import ObjectStore
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running


async def test_a_message_that_was_tried_by_three_workers_leaves_its_song_and_its_manifest(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    url, object_store, go = (
        service_environment["ACESTEP_AMQP_URL"],
        ObjectStore.of(service_environment),
        tmp_path / "go",
    )

    async def records() -> set[str]:
        return {name for name in await object_store.names("song") if name.startswith("attempts/")}

    async def no_records() -> bool:
        return not await records()

    async with running(WorkerProcess(tmp_path, service_environment, light=True)):
        pass  # it has declared the queues
    async with EventRecorder(url) as recorder, Peer(url) as peer:
        await peer.submit(task_id="song", prompt=f"until={go}")
        for number in (1, 2):
            async with running(WorkerProcess(tmp_path, service_environment, light=True)) as worker:
                await eventually(lambda: recorder.states("song").count("started") == number, WITHIN_S)  # noqa: B023 - awaited at once
                worker.kill()
        assert await records()
        async with running(WorkerProcess(tmp_path, service_environment, light=True)):
            go.touch()
            await eventually(lambda: recorder.terminal("song"), WITHIN_S)
            await until(no_records, "no records of attempts", WITHIN_S)
        (end,) = recorder.terminal("song")
        assert (end.state, end.data["attempt"]) == ("completed", 3)
