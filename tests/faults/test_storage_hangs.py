# SPDX-License-Identifier: Apache-2.0
"""S3 takes requests and never answers: the worker gives up on the answer, asks again, and the job is done once."""

from pathlib import Path

from tests.support.scenario import manifest_of, scenario
from tests.support.waiting import WITHIN_S, eventually

# The worker's own patience with a silent server is 30 s; these tests need not wait for so long.
IMPATIENT = {"LIGHT_S3_READ_S": "1"}


async def test_a_job_outlasts_requests_that_nobody_answers(service_environment: dict[str, str], tmp_path: Path) -> None:
    async with scenario(service_environment, tmp_path, **IMPATIENT) as seen:
        with seen.s3.hold(lambda request: request.path.endswith("/song/0.wav")) as upload:
            await seen.peer.submit(task_id="song")
            # Asked once, given up, and asked again.
            await eventually(lambda: upload.seen >= 2, WITHIN_S)
            assert seen.recorder.terminal("song") == []
        await seen.all_ended("song")
        await seen.assert_completed_once("song")


async def test_a_manifest_whose_answer_never_came_is_recognised_as_our_own(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path, **IMPATIENT) as seen:
        with seen.s3.hold(manifest_of("song", "PUT"), answered=True) as commit:
            await seen.peer.submit(task_id="song")
            await eventually(lambda: commit.seen >= 2, WITHIN_S)
        await seen.all_ended("song")
        await seen.assert_completed_once("song")
        assert seen.recorder.states("song").count("started") == 1
        await seen.assert_nothing_left()
