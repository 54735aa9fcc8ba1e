# SPDX-License-Identifier: Apache-2.0
"""Two workers race for one task: one set of objects, and both messages are answered with the same end."""

from pathlib import Path

from tests.support.event_recorder import RecordedEvent
from tests.support.scenario import manifest_of, scenario
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running


async def test_two_workers_that_finish_one_task_in_the_same_moment_tell_one_end(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    async with scenario(service_environment, tmp_path, ACESTEP_WORKER_ID="first") as seen:
        # Both reach S3 through the same front, so that one hold stops both at the same point.
        through = {"ACESTEP_S3_ENDPOINT": seen.s3.endpoint, "ACESTEP_WORKER_ID": "second"}
        async with running(WorkerProcess(tmp_path, service_environment | through, light=True)):
            for _ in range(2):
                await seen.peer.submit(task_id="song", batch_size=2, prompt=f"until={go}")
            await eventually(lambda: len(starters(seen.recorder.of("song"))) == 2, WITHIN_S)
            with (
                seen.s3.hold(manifest_of("song", "PUT")) as commits,
                seen.s3.hold(lambda request: request.method == "PUT" and ".wav" in request.path) as uploads,
            ):
                go.touch()
                await eventually(lambda: uploads.waiting == 4, WITHIN_S)
                uploads.over.set()
                await eventually(lambda: commits.waiting == 2, WITHIN_S)
            await eventually(lambda: len(seen.recorder.terminal("song")) == 2, WITHIN_S)
        await seen.assert_completed_once("song")
        assert await seen.object_store.names("song") == {"0.wav", "1.wav", "manifest.json"}
        await seen.assert_nothing_left()
    assert starters(seen.recorder.of("song")) == {"first", "second"}


def starters(events: list[RecordedEvent]) -> set[str]:
    """Who began with the task."""
    return {event.data["worker_id"] for event in events if event.state == "started"}
