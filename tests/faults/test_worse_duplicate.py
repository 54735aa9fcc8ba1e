# SPDX-License-Identifier: Apache-2.0
"""While a job renders, a worse message comes under its id. It ends by itself, and the job keeps its songs."""

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from acestep_consumer.broker.topology import DEAD_LETTER
from tests.support.broker import Peer, until
from tests.support.scenario import Scenario, scenario
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running


async def render_until(seen: Scenario, go: Path) -> None:
    await seen.peer.submit(task_id="song", prompt=f"until={go}")
    await eventually(lambda: "started" in seen.recorder.states("song"), WITHIN_S)


async def completed(seen: Scenario) -> None:
    """Wait for the job's songs, and see that the bucket and every later message agree with them."""
    await eventually(lambda: "completed" in seen.recorder.states("song"), WITHIN_S)
    told = next(heard for heard in seen.recorder.of("song") if heard.state == "completed")
    assert await seen.object_store.wrongs(told.data) == []
    count = seen.recorder.states("song").count("completed")
    await seen.peer.submit(task_id="song", prompt=told.data["request"]["prompt"])
    await eventually(lambda: seen.recorder.states("song").count("completed") > count, WITHIN_S)


async def expired(peer: Peer) -> bool:
    """Whether the broker has given the waiting retry up: its dead letter is there."""
    return await peer.ready(DEAD_LETTER) == 1


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_retry_that_expires_does_not_end_the_running_job(
    kind: str, service_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    variables = {"ACESTEP_QUEUE_WORKERS": "1", "ACESTEP_QUEUE_TYPE": kind}
    async with scenario(service_environment, tmp_path, **variables) as seen:
        await render_until(seen, go)
        body = {"task_id": "song", "prompt": "retry"}
        await seen.peer.request(json.dumps(body).encode(), message_id="song", expiration=0.2)
        await until(partial(expired, seen.peer), "the retry has expired")
        go.touch()
        await completed(seen)
        assert "expired" not in seen.recorder.states("song")


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_copy_of_the_same_second_that_expires_does_not_end_the_one_that_waits(
    kind: str, service_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    variables = {"ACESTEP_QUEUE_WORKERS": "1", "ACESTEP_QUEUE_TYPE": kind}
    async with scenario(service_environment, tmp_path, **variables) as seen:
        await seen.peer.submit(task_id="other", prompt=f"until={go}")
        await eventually(lambda: "started" in seen.recorder.states("other"), WITHIN_S)
        body = json.dumps({"task_id": "song", "prompt": "x", "audio_format": "wav", "audio_duration": 10}).encode()
        properties = {"message_id": "song", "timestamp": datetime.now(UTC).replace(microsecond=0)}
        await seen.peer.request(body, expiration=0.2, **properties)
        await seen.peer.request(body, **properties)
        await eventually(lambda: "expired" in seen.recorder.states("song"), WITHIN_S)
        go.touch()
        await eventually(lambda: "completed" in seen.recorder.states("song"), WITHIN_S)


async def test_garbage_under_its_message_id_does_not_end_the_running_job(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    async with scenario(service_environment, tmp_path, ACESTEP_QUEUE_WORKERS="2") as seen:
        await render_until(seen, go)
        await seen.peer.request(b"garbage", message_id="song")
        go.touch()
        await completed(seen)
        assert "rejected" not in seen.recorder.states("song")


async def test_a_worse_message_on_another_worker_does_not_lose_the_songs(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    async with scenario(service_environment, tmp_path, ACESTEP_QUEUE_WORKERS="1", ACESTEP_WORKER_ID="first") as seen:
        await render_until(seen, go)
        environment = service_environment | {"ACESTEP_WORKER_ID": "second", "ACESTEP_QUEUE_WORKERS": "1"}
        async with running(WorkerProcess(tmp_path, environment, light=True)):
            await seen.peer.request(b"garbage", message_id="song")
            await eventually(lambda: "rejected" in seen.recorder.states("song"), WITHIN_S)
            go.touch()
            await completed(seen)
