# SPDX-License-Identifier: Apache-2.0
"""S3 fails in the middle of a song that is sent in parts: for a moment, or for longer than one upload is tried."""

from pathlib import Path

from aiohttp import web

from tests.support.faulty_s3 import s3_error
from tests.support.scenario import scenario
from tests.support.waiting import WITHIN_S, eventually

# Two parts of 8 MiB and a rest.
LARGE = f"bytes={20 << 20}"


def is_part(number: int, request: web.Request) -> bool:
    return request.method == "PUT" and request.query.get("partNumber") == str(number)


async def test_one_part_that_fails_is_sent_again_and_the_others_are_not(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    failures = [s3_error(500, "InternalError"), s3_error(503, "SlowDown")]
    async with scenario(service_environment, tmp_path) as seen:
        with seen.s3.fault(lambda request: failures.pop() if failures and is_part(2, request) else None):
            await seen.peer.submit(task_id="song", prompt=LARGE)
            await seen.all_ended("song")
        await seen.assert_completed_once("song")
        parts = [path for method, path in seen.s3.requests if method == "PUT" and "partNumber" in path]
        assert [sum(f"partNumber={number}" in path for path in parts) for number in (1, 2, 3)] == [1, 3, 1]
        assert seen.object_store.open_uploads() == []


async def test_a_part_that_fails_for_long_is_waited_for_and_leaves_no_upload_open(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path) as seen:
        with seen.s3.fault(lambda request: s3_error(503, "SlowDown") if is_part(3, request) else None):
            await seen.peer.submit(task_id="song", prompt=LARGE)
            await eventually(lambda: seen.worker.log_lines(level="error"), WITHIN_S)
            assert "storage is unavailable" in seen.worker.log.read_text()
            assert seen.recorder.terminal("song") == []
        await seen.all_ended("song")
        await seen.assert_completed_once("song")
        assert seen.recorder.states("song").count("started") == 1
        await eventually(lambda: seen.object_store.open_uploads() == [], WITHIN_S)
