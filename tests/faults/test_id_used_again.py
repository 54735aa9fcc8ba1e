# SPDX-License-Identifier: Apache-2.0
"""A task id is published again after a job that ended without songs: the new request gets songs of its own."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aiohttp import web

from tests.support.scenario import Scenario, manifest_of, scenario
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running


def put_of(ending: str) -> Callable[[web.Request], bool]:
    return lambda request: request.method == "PUT" and request.path.endswith(ending)


async def cancelled_after_its_upload(seen: Scenario, task_id: str, prompt: str) -> None:
    """Have a job cancelled when its song is stored and its manifest is not."""
    with seen.s3.hold(put_of(f"/{task_id}/0.wav"), answered=True) as upload:
        await seen.peer.submit(task_id=task_id, prompt=prompt)
        await eventually(lambda: upload.waiting == 1, WITHIN_S)
        await seen.peer.cancel(task_id)
        await eventually(lambda: seen.recorder.terminal(task_id), WITHIN_S)
    assert [heard.state for heard in seen.recorder.terminal(task_id)] == ["cancelled"]


async def test_a_song_of_a_cancelled_job_is_not_delivered_under_the_next_request(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path) as seen:
        await cancelled_after_its_upload(seen, "song", "bytes=30000")
        # With a timestamp after the cancellation: one without would be cancelled as well.
        body = {"task_id": "song", "prompt": "bytes=50000", "audio_format": "wav", "audio_duration": 10}
        later = datetime.now(UTC) + timedelta(seconds=2)
        await seen.peer.request(json.dumps(body).encode(), message_id="song", timestamp=later)
        await eventually(lambda: len(seen.recorder.terminal("song")) == 2, WITHIN_S)
        told = seen.recorder.terminal("song")[-1]
        assert told.state == "completed"
        assert told.data["request"]["prompt"] == "bytes=50000"
        assert told.data["audios"][0]["bytes"] > 50_000
        assert await seen.object_store.wrongs(told.data) == []


async def test_a_redelivery_still_takes_over_the_song_that_its_own_first_delivery_stored(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path) as seen:
        with seen.s3.hold(manifest_of("song", "PUT")) as commit:
            await seen.peer.submit(task_id="song")
            await eventually(lambda: commit.waiting == 1, WITHIN_S)
            seen.amqp.cut()
            await eventually(lambda: len([h for h in seen.recorder.of("song") if h.state == "started"]) >= 1, WITHIN_S)
        await seen.all_ended("song")
        await seen.assert_completed_once("song")
        assert await seen.object_store.names("song") == {"0.wav", "manifest.json"}


async def test_two_requests_under_one_id_on_two_workers_never_share_an_object(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    """The second overtakes the first between its upload and its manifest; whoever commits, the checksum fits."""
    async with scenario(service_environment, tmp_path, ACESTEP_WORKER_ID="first", ACESTEP_QUEUE_WORKERS="1") as seen:
        with seen.s3.hold(manifest_of("song", "PUT")) as commit:
            await seen.peer.submit(task_id="song", prompt="bytes=30000")
            await eventually(lambda: commit.waiting == 1, WITHIN_S)
            environment = service_environment | {"ACESTEP_WORKER_ID": "second", "ACESTEP_QUEUE_WORKERS": "1"}
            async with running(WorkerProcess(tmp_path, environment, light=True)):
                await seen.peer.submit(task_id="song", prompt="bytes=50000")
                await eventually(lambda: seen.recorder.terminal("song"), WITHIN_S)
                commit.over.set()
                await eventually(lambda: len(seen.recorder.terminal("song")) == 2, WITHIN_S)
        for told in seen.recorder.terminal("song"):
            assert told.state == "completed"
            sizes = {"bytes=30000": 30_000, "bytes=50000": 50_000}
            assert told.data["audios"][0]["bytes"] // 1_000 == sizes[told.data["request"]["prompt"]] // 1_000
        assert await seen.object_store.wrongs(seen.recorder.terminal("song")[-1].data) == []


async def test_another_body_under_a_finished_id_is_answered_with_a_warning(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path) as seen:
        await seen.peer.submit(task_id="song", prompt="bytes=30000")
        await seen.all_ended("song")
        await seen.peer.submit(task_id="song", prompt="bytes=30000")
        await eventually(lambda: len(seen.recorder.terminal("song")) == 2, WITHIN_S)
        await seen.peer.submit(task_id="song", prompt="bytes=50000")
        await eventually(lambda: len(seen.recorder.terminal("song")) == 3, WITHIN_S)
        first, equal, other = (json.loads(heard.body)["data"] for heard in seen.recorder.terminal("song"))
        assert first == equal
        assert other["audios"] == first["audios"]
        assert [warning for warning in other["warnings"] if "another body" in warning]
