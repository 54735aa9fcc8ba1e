# SPDX-License-Identifier: Apache-2.0
"""Workers with cards of different sizes on one queue: what exceeds the small one's limits, and every way to lose it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from acestep_consumer.broker.topology import GENERATE, tier_queue
from tests.support.broker import until
from tests.support.proxy import Direction, Where
from tests.support.scenario import CONSUMING, Scenario, scenario
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.event_recorder import RecordedEvent

ROUTING = {"ACESTEP_ROUTE_BY_TIER": "true", "ACESTEP_QUEUE_WORKERS": "2"}
SMALL = {**ROUTING, "MAX_CUDA_VRAM": "4", "ACESTEP_WORKER_ID": "small"}
LARGE = {**ROUTING, "MAX_CUDA_VRAM": "24", "ACESTEP_WORKER_ID": "large"}
BIG = {"audio_duration": 400, "batch_size": 2}


@asynccontextmanager
async def large(environment: dict[str, str], folder: Path) -> AsyncIterator[WorkerProcess]:
    """A second worker, with a card of 24 GB, that is there for others."""
    folder.mkdir()  # noqa: ASYNC240 - at once
    async with running(WorkerProcess(folder, environment | LARGE, light=True)) as worker:
        await there(worker)
        yield worker


async def there(worker: WorkerProcess) -> None:
    """Wait until it takes messages, and others are told so."""
    await eventually(lambda: worker.log_lines(event="ready"), WITHIN_S)


def whole(told: RecordedEvent) -> bool:
    """Whether a job had all that it asked for, from the larger card."""
    policy: dict[str, Any] = told.data["policy"]
    return (policy["tier"], policy["adjustments"], told.data["worker_id"]) == ("tier6", [], "large")


async def assert_whole_and_once(here: Scenario, *task_ids: str) -> None:
    await here.assert_completed_once(*task_ids)
    assert all(whole(told) for task_id in task_ids for told in here.recorder.terminal(task_id))


async def nothing_waits(here: Scenario) -> bool:
    return not await here.peer.ready(GENERATE) and not await here.peer.ready(tier_queue("tier6"))


async def test_what_exceeds_the_small_card_is_done_whole_by_the_large_one_and_the_rest_by_both(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    async with (
        scenario(own_worker_environment, tmp_path, **SMALL) as here,
        large(own_worker_environment, tmp_path / "large"),
    ):
        await there(here.worker)
        bigs = [f"big-{number}" for number in range(6)]
        smalls = [f"small-{number}" for number in range(12)]
        for number, task_id in enumerate(smalls):
            await here.peer.submit(task_id=task_id, prompt="takes=0.2")
            if number < len(bigs):
                await here.peer.submit(task_id=bigs[number], **BIG)
        # Where submitting is slow, both cards are idle and take turns: the small one had none but the small ones.
        async with asyncio.timeout(WITHIN_S):
            while not here.worker.log_lines(event="forwarded to a larger tier", tier="tier6"):
                bigs += [f"big-{len(bigs)}", f"big-{len(bigs) + 1}"]
                for task_id in bigs[-2:]:
                    await here.peer.submit(task_id=task_id, **BIG)
                await here.all_ended(*bigs)
        await here.all_ended(*bigs, *smalls)
        await here.assert_completed_once(*smalls)
        await assert_whole_and_once(here, *bigs)
        assert {here.recorder.terminal(task_id)[0].data["worker_id"] for task_id in smalls} == {"small", "large"}
        await until(lambda: nothing_waits(here), "both queues are empty")


async def test_without_a_larger_card_it_is_clamped_and_said(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(own_worker_environment, tmp_path, **SMALL) as here:
        await there(here.worker)
        await here.peer.submit(task_id="big", **BIG)
        await here.all_ended("big")
        policy = here.recorder.terminal("big")[0].data["policy"]
        assert {change["field"]: change["applied"] for change in policy["adjustments"]} == {
            "audio_duration": 180,
            "batch_size": 1,
        }


async def test_what_was_sent_on_outlives_the_large_worker_and_is_done_whole_by_the_next(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    """It runs two when it is killed, and two wait. What came to it from the producers may be clamped now."""
    task_ids = [f"outlives-{number}" for number in range(4)]
    go = tmp_path / "go"
    async with scenario(own_worker_environment, tmp_path, **SMALL) as here:
        await there(here.worker)
        async with large(own_worker_environment, tmp_path / "first") as first:
            for task_id in task_ids:
                await here.peer.submit(task_id=task_id, prompt=f"until={go}", **BIG)
            await eventually(lambda: sum("started" in here.recorder.states(each) for each in task_ids) == 2, WITHIN_S)

            async def waiting() -> bool:
                return await here.peer.ready(tier_queue("tier6")) == 2

            await until(waiting, "two wait for the large card")
            first.kill()
        go.touch()
        async with large(own_worker_environment, tmp_path / "second"):
            await here.all_ended(*task_ids)
        await here.assert_completed_once(*task_ids)
        assert sum(whole(here.recorder.terminal(task_id)[0]) for task_id in task_ids) >= 2
        await until(lambda: nothing_waits(here), "both queues are empty")


async def test_a_worker_killed_between_sending_on_and_its_ack_costs_nothing_and_says_nothing_new(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    task_ids = [f"killed-{number}" for number in range(6)]
    async with (
        scenario(own_worker_environment, tmp_path, **SMALL) as here,
        large(own_worker_environment, tmp_path / "large"),
    ):
        await there(here.worker)
        here.amqp.stall(Where(Direction.UP, CONSUMING))
        for task_id in task_ids:
            await here.peer.submit(task_id=task_id, **BIG)
        await here.all_ended(*task_ids)
        # As many as it may run.
        await eventually(lambda: len(here.worker.log_lines(event="forwarded to a larger tier")) == 2, WITHIN_S)
        told = sum(len(here.recorder.terminal(task_id)) for task_id in task_ids)
        here.worker.kill()
        here.amqp.cut()
        await eventually(
            lambda: sum(len(here.recorder.terminal(task_id)) for task_id in task_ids) == told + 2, WITHIN_S
        )
        await assert_whole_and_once(here, *task_ids)
        await until(lambda: nothing_waits(here), "both queues are empty")


async def test_the_large_worker_that_drains_is_sent_nothing_more(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    async with scenario(own_worker_environment, tmp_path, **SMALL) as here:
        await there(here.worker)
        async with large(own_worker_environment, tmp_path / "large") as leaving:
            await here.peer.submit(task_id="running", prompt=f"until={go}", **BIG)
            await eventually(lambda: "started" in here.recorder.states("running"), WITHIN_S)
            ending = asyncio.create_task(asyncio.to_thread(leaving.process.end, WITHIN_S))
            await eventually(lambda: leaving.log_lines(event="draining"), WITHIN_S)
            await here.peer.submit(task_id="late", **BIG)
            await here.all_ended("late")
            go.touch()
            await ending
        await here.all_ended("running")
        await assert_whole_and_once(here, "running")
        assert here.recorder.terminal("late")[0].data["worker_id"] == "small"
