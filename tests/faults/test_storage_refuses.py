# SPDX-License-Identifier: Apache-2.0
"""S3 says no, as when keys have been withdrawn: the job waits until somebody has put it right, and is done then."""

from pathlib import Path

from tests.support.faulty_s3 import s3_error
from tests.support.scenario import scenario
from tests.support.waiting import WITHIN_S, eventually


async def test_a_job_waits_until_its_keys_are_good_again(service_environment: dict[str, str], tmp_path: Path) -> None:
    async with scenario(service_environment, tmp_path) as seen:
        with seen.s3.fault(lambda request: s3_error(403, "InvalidAccessKeyId") if request.method == "PUT" else None):
            await seen.peer.submit(task_id="song")
            await eventually(lambda: "storage is unavailable" in seen.worker.log.read_text(), WITHIN_S)
            # The log tells what to do about it.
            assert "check AWS_ACCESS_KEY_ID" in seen.worker.log.read_text()
            assert seen.recorder.terminal("song") == []
        await seen.all_ended("song")
        await seen.assert_completed_once("song")
        assert seen.recorder.states("song").count("started") == 1
