# SPDX-License-Identifier: Apache-2.0
"""While a job renders, a worse message comes under its id. It ends by itself, and the job keeps its songs."""

import json
from pathlib import Path

import pytest

from tests.support.scene import WITHIN_S, Scene, scene
from tests.support.waiting import eventually
from tests.support.worker import WorkerProcess, running


async def render_until(seen: Scene, go: Path) -> None:
    await seen.peer.submit(task_id="song", prompt=f"until={go}")
    await eventually(lambda: "started" in seen.ear.states("song"), WITHIN_S)


async def completed(seen: Scene) -> None:
    """Wait for the job's songs, and see that the bucket and every later message agree with them."""
    await eventually(lambda: "completed" in seen.ear.states("song"), WITHIN_S)
    told = next(heard for heard in seen.ear.of("song") if heard.state == "completed")
    assert await seen.shelf.wrongs(told.data) == []
    await seen.peer.submit(task_id="song", prompt=told.data["request"]["prompt"])
    count = seen.ear.states("song").count("completed")
    await eventually(lambda: seen.ear.states("song").count("completed") > count, WITHIN_S)


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_retry_that_expires_does_not_end_the_running_job(
    kind: str, service_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    variables = {"ACESTEP_QUEUE_WORKERS": "1", "ACESTEP_QUEUE_TYPE": kind}
    async with scene(service_environment, tmp_path, **variables) as seen:
        await render_until(seen, go)
        body = {"task_id": "song", "prompt": "retry"}
        await seen.peer.request(json.dumps(body).encode(), message_id="song", expiration=0.2)
        # The notice is consumed while the job runs, and must not be settled before it.
        await eventually(lambda: seen.worker.get("/readyz")[0] == 200, WITHIN_S) if False else None
        await seen.peer.submit(task_id="other")  # waits behind: the expired one is at the head before
        go.touch()
        await completed(seen)
        assert "expired" not in seen.ear.states("song")


async def test_garbage_under_its_message_id_does_not_end_the_running_job(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    async with scene(service_environment, tmp_path, ACESTEP_QUEUE_WORKERS="2") as seen:
        await render_until(seen, go)
        await seen.peer.request(b"garbage", message_id="song")
        go.touch()
        await completed(seen)
        assert "rejected" not in seen.ear.states("song")


async def test_a_worse_message_on_another_worker_does_not_lose_the_songs(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    async with scene(service_environment, tmp_path, ACESTEP_QUEUE_WORKERS="1", ACESTEP_WORKER_ID="first") as seen:
        await render_until(seen, go)
        environment = service_environment | {"ACESTEP_WORKER_ID": "second", "ACESTEP_QUEUE_WORKERS": "1"}
        async with running(WorkerProcess(tmp_path, environment, light=True)):
            await seen.peer.request(b"garbage", message_id="song")
            await eventually(lambda: "rejected" in seen.ear.states("song"), WITHIN_S)
            go.touch()
            await completed(seen)
