# SPDX-License-Identifier: Apache-2.0
"""S3 answers most requests with 503 for as long as jobs run: all of them are done, once, and none fails."""

import random
from pathlib import Path

from aiohttp import web

from tests.support.faulty_s3 import s3_error
from tests.support.scenario import scenario

JOBS = [f"song-{number}" for number in range(12)]
SHARE = 0.6


async def test_jobs_are_done_though_most_requests_are_answered_with_503(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    chance = random.Random(503)  # noqa: S311 - no secret
    answered = 0

    def slow_down(_: web.Request) -> web.Response | None:
        nonlocal answered
        if chance.random() >= SHARE:
            return None
        answered += 1
        return s3_error(503, "SlowDown")

    async with scenario(service_environment, tmp_path, ACESTEP_QUEUE_WORKERS="4") as seen:
        with seen.s3.fault(slow_down):
            for task_id in JOBS:
                await seen.peer.submit(task_id=task_id)
            await seen.all_ended(*JOBS)
        await seen.assert_completed_once(*JOBS)
        await seen.assert_nothing_left()
    assert answered > len(JOBS)
