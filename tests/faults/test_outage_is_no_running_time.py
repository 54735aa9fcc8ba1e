# SPDX-License-Identifier: Apache-2.0
"""Waiting for the broker or storage is not running time: no job fails for an outage longer than its limit."""

import asyncio
import time
from pathlib import Path

from tests.support.faulty_s3 import s3_error
from tests.support.proxy import Where
from tests.support.scenario import PUBLISHING, Scenario, scenario
from tests.support.waiting import WITHIN_S, eventually

LIMIT_S = 4


async def test_storage_that_is_away_for_longer_than_the_limit_does_not_end_the_job(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    variables = {"ACESTEP_EXECUTION_TIMEOUT_S": str(LIMIT_S), "LIGHT_S3_READ_S": "1"}
    async with scenario(service_environment, tmp_path, **variables) as seen:
        with seen.s3.fault(lambda request: s3_error(503, "SlowDown") if ".wav" in request.path else None):
            await seen.peer.submit(task_id="song", prompt="takes=0.5")
            await eventually(lambda: any(".wav" in path for _, path in seen.s3.requests), WITHIN_S)
            await without_an_end(seen, LIMIT_S + 2)
        await seen.all_ended("song")
        await seen.assert_completed_once("song")


async def test_a_broker_that_confirms_nothing_for_longer_than_the_limit_does_not_end_the_job(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    """The manifest does not wait for the events either."""
    async with scenario(service_environment, tmp_path, ACESTEP_EXECUTION_TIMEOUT_S=str(LIMIT_S)) as seen:
        seen.amqp.stall(Where(of=PUBLISHING))
        await seen.peer.submit(task_id="song", prompt="takes=0.5")
        committed = time.monotonic() + WITHIN_S
        while "manifest.json" not in await seen.object_store.names("song"):
            assert time.monotonic() < committed
            await asyncio.sleep(0.1)
        await without_an_end(seen, LIMIT_S + 2)
        seen.amqp.heal()
        await seen.all_ended("song", within_s=2 * WITHIN_S)
        await seen.assert_completed_once("song")


async def without_an_end(seen: Scenario, seconds: float) -> None:
    """See that no terminal event comes for so long: longer than a job may run."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert not seen.recorder.terminal("song")
        await asyncio.sleep(0.2)
