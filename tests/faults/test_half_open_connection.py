# SPDX-License-Identifier: Apache-2.0
"""A connection whose far end is gone without a word: heartbeats find out, on both sides, and the job is done once."""

from pathlib import Path

from tests.support.scenario import scenario
from tests.support.waiting import WITHIN_S, eventually


async def test_a_dead_connection_is_noticed_and_its_job_is_done_once(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    url = f"{service_environment['ACESTEP_AMQP_URL']}?heartbeat=1"
    go = tmp_path / "go"
    async with scenario(service_environment | {"ACESTEP_AMQP_URL": url}, tmp_path) as seen:
        await seen.peer.submit(task_id="song", prompt=f"until={go}")
        await eventually(lambda: "started" in seen.recorder.states("song"), WITHIN_S)
        connected = seen.amqp.accepted
        lost = seen.amqp.abandon()
        assert lost >= 2
        await eventually(lambda: seen.amqp.accepted >= connected + lost, WITHIN_S)
        # The work goes on meanwhile: its message comes again, and waits for the first run.
        go.touch()
        await seen.all_ended("song")
        await seen.is_ready()
        await seen.peer.submit(task_id="later")
        await seen.all_ended("later")
        await seen.assert_completed_once("song", "later")
    assert seen.worker.log_lines(event="broker connection lost, reconnecting")
