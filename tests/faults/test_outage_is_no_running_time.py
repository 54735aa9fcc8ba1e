# SPDX-License-Identifier: Apache-2.0
"""Waiting for the broker or storage is not running time: no job fails for an outage longer than its limit."""

import asyncio
import time
from pathlib import Path

from tests.support.faulty_s3 import s3_error
from tests.support.scene import WITHIN_S, scene
from tests.support.waiting import eventually

LIMIT_S = 4


async def test_a_broker_that_confirms_no_started_event_does_not_end_the_job(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scene(service_environment, tmp_path, ACESTEP_EXECUTION_TIMEOUT_S=str(LIMIT_S)) as seen:
        await seen.amqp_publishing_stalls() if hasattr(seen, "amqp_publishing_stalls") else None
        await seen.peer.submit(task_id="song", prompt="takes=0.5")
        await seen.all_ended("song")
        assert seen.ear.terminal("song")[0].state == "completed"


async def test_storage_that_is_away_for_longer_than_the_limit_does_not_end_the_job(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    variables = {"ACESTEP_EXECUTION_TIMEOUT_S": str(LIMIT_S), "LIGHT_S3_READ_S": "1"}
    async with scene(service_environment, tmp_path, **variables) as seen:
        broken = seen.s3.fault(lambda request: s3_error(503, "SlowDown") if ".wav" in request.path else None)
        with broken:
            await seen.peer.submit(task_id="song", prompt="takes=0.5")
            await eventually(
                lambda: seen.worker.log_lines(event="storage is away: work in hand waits, nothing new is taken"),
                WITHIN_S,
            )
            # Longer than the limit counts from here, with the job waiting in its upload.
            until = time.monotonic() + LIMIT_S + 2
            while time.monotonic() < until:
                assert not seen.ear.terminal("song")
                await asyncio.sleep(0.2)
        await seen.all_ended("song")
        await seen.assert_completed_once("song")
