# SPDX-License-Identifier: Apache-2.0
"""A subscriber's full queue makes the broker refuse events: nothing is acked before everybody could be told."""

from pathlib import Path

from acestep_consumer.broker.topology import EVENTS, GENERATE
from tests.support.scenario import scenario
from tests.support.waiting import WITHIN_S, eventually

FULL = {"x-max-length": 0, "x-overflow": "reject-publish"}


async def test_a_job_is_not_acked_before_its_end_is_told_to_all(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path) as seen:
        full = await seen.peer.subscribe("job.completed.#", **FULL)
        await seen.peer.submit(task_id="song")
        # Others hear it, as often as it is tried.
        await eventually(lambda: len(seen.recorder.terminal("song")) >= 3, WITHIN_S)
        seen.worker.kill()
        # It was unacknowledged all the time: with the worker it comes back.
        assert (await seen.peer.look(GENERATE)).redelivered
        queue = await seen.peer.channel.get_queue(full, ensure=False)
        await queue.unbind(EVENTS, "job.completed.#")
    await seen.assert_completed_once("song")


async def test_a_job_is_acked_as_soon_as_the_subscriber_has_room(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path) as seen:
        full = await seen.peer.subscribe("job.completed.#", **FULL)
        await seen.peer.submit(task_id="song")
        await eventually(lambda: len(seen.recorder.terminal("song")) >= 2, WITHIN_S)
        queue = await seen.peer.channel.get_queue(full, ensure=False)
        await queue.unbind(EVENTS, "job.completed.#")
        # The next job gets its turn once this one is acked: the worker has a prefetch of one.
        await seen.peer.submit(task_id="next")
        await seen.all_ended("next")
        await seen.assert_completed_once("song", "next")
        await seen.assert_nothing_left()
