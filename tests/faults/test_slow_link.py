# SPDX-License-Identifier: Apache-2.0
"""A link of a few kilobytes a second: jobs take longer, and nothing else changes."""

from pathlib import Path

from tests.support.scenario import scenario

JOBS = [f"song-{number}" for number in range(6)]
BYTES_PER_S = 6_000


async def test_a_slow_link_costs_time_and_no_connection(service_environment: dict[str, str], tmp_path: Path) -> None:
    async with scenario(service_environment, tmp_path, ACESTEP_QUEUE_WORKERS="3") as seen:
        connected = seen.amqp.accepted
        seen.amqp.slow(BYTES_PER_S)
        for task_id in JOBS:
            await seen.peer.submit(task_id=task_id)
        await seen.all_ended(*JOBS)
        await seen.assert_completed_once(*JOBS)
        assert seen.amqp.accepted == connected
        # Nobody lost patience: each was told once.
        assert [len(seen.recorder.terminal(task_id)) for task_id in JOBS] == [1] * len(JOBS)
        seen.amqp.heal()
