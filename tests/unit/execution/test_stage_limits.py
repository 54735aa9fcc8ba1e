# SPDX-License-Identifier: Apache-2.0
"""Limits of stages: who waits for whom, what is counted, and that nothing is left behind."""

import asyncio
from dataclasses import replace

import pytest

from acestep_consumer.domain.job import Job, Plan
from acestep_consumer.domain.stages import EngineCapacity
from acestep_consumer.execution.stage_limits import UPLOADS, JobPlaces, StageGate, StageLimits
from acestep_consumer.policy.memory_budget import PACKS
from acestep_schemas.events import LmChoice, Metas
from tests.support.admission import admitted_job

PLAN = Plan(metas=Metas(duration=100))
JOB = replace(admitted_job(), lm=LmChoice(model="lm", backend="vllm"))


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class GateOrder:
    """Jobs at a gate, by name, in the order in which they got in."""

    def __init__(self, gate: StageGate) -> None:
        self.gate = gate
        self.inside: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def arrive(self, name: str, weight: float = 1, rank: float = 0) -> None:
        async def enter() -> None:
            await self.gate.enter(weight, rank)
            self.inside.append(name)

        self.tasks[name] = asyncio.create_task(enter())
        await settled()


async def test_a_gate_lets_in_what_fits_and_the_rest_by_rank_as_places_become_free() -> None:
    line = GateOrder(StageGate(lambda: 3))
    for name, rank in (("a", 0), ("b", 0), ("c", 0), ("d", 5), ("e", 4), ("f", 4), ("g", -1)):
        await line.arrive(name, rank=rank)
    assert (line.inside, line.gate.waiting, line.gate.jobs, line.gate.limit) == (["a", "b", "c"], 4, 3, 3)
    for _ in range(4):
        line.gate.leave(1)
        await settled()
    assert line.inside == ["a", "b", "c", "g", "e", "f", "d"]


async def test_weights_count_but_two_jobs_get_in_whatever_they_weigh() -> None:
    line = GateOrder(StageGate(lambda: 10))
    await line.arrive("heavy", 50)
    await line.arrive("heavy too", 50)
    await line.arrive("light", 1)
    assert line.inside == ["heavy", "heavy too"]
    line.gate.leave(50)
    await settled()
    assert line.inside == ["heavy", "heavy too", "light"]
    line.gate.leave(50)
    await line.arrive("another", 9)
    await line.arrive("over", 1)
    assert (line.inside[-1], line.gate.weight, line.gate.waiting) == ("another", 10, 1)


async def test_a_job_that_is_cancelled_while_it_waits_or_as_it_gets_in_leaves_nothing_behind() -> None:
    line = GateOrder(StageGate(lambda: 2))
    for name in "abcd":
        await line.arrive(name)
    line.tasks["c"].cancel()
    await settled()
    line.gate.leave(1)
    line.tasks["d"].cancel()  # it has its place, and has not seen it yet
    await settled()
    assert (line.inside, line.gate.jobs, line.gate.waiting) == (["a", "b"], 1, 0)
    await line.arrive("e")
    assert line.inside[-1] == "e"


async def render(places: JobPlaces) -> None:
    await places.plan()
    await places.render(PLAN)


async def test_a_plan_keeps_its_place_in_the_language_model_until_the_renderer_has_room() -> None:
    """Songs of 100 s in a renderer for 2 of them a batch; the language model has rows for 8."""
    stages = StageLimits(lambda: EngineCapacity(lm_songs=8, pack_s=200, encoders=2))
    jobs = [JobPlaces(stages, JOB) for _ in range(16)]
    tasks = [asyncio.create_task(render(each)) for each in jobs]
    await settled()
    inside = 2 * PACKS
    assert sum(task.done() for task in tasks) == inside
    assert (stages.gate("render").jobs, stages.gate("plan").jobs) == (inside, 8)
    assert stages.waiting == {"fetch": 0, "plan": 2, "render": 8, "encode": 0, "upload": 0}
    assert stages.limits == {"fetch": None, "plan": 8, "render": inside, "encode": 2, "upload": UPLOADS}
    assert stages.wanted == -9
    # The first song waits for an encoder in the renderer, and gets one: only then its place is free.
    report = jobs[0].rendering(lambda *_: None)
    report(0.5, "render")
    report(1.0, "render")
    await settled()
    assert (stages.waiting["encode"], stages.gate("render").jobs) == (1, inside)
    report(0.0, "encode")
    await settled()
    assert (stages.waiting["encode"], stages.waiting["render"], stages.waiting["plan"]) == (0, 8, 1)
    assert (stages.gate("encode").jobs, stages.gate("render").jobs) == (1, inside)
    # Its process dies then, and the next one renders the song again.
    report(0.1, "render")
    assert (stages.gate("encode").jobs, stages.gate("render").jobs) == (0, inside + 1)
    report(1.0, "render")
    report(0.0, "encode")
    assert (stages.gate("encode").jobs, stages.gate("render").jobs) == (1, inside)
    await jobs[0].upload()
    assert (stages.gate("encode").jobs, stages.gate("upload").jobs) == (0, 1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for each in jobs:
        with each:
            pass
    assert [stages.gate(stage).jobs for stage in ("plan", "render", "encode", "upload")] == [0, 0, 0, 0]
    assert set(stages.waiting.values()) == {0}


async def test_sequences_that_wait_for_the_language_models_memory_hold_back_all_but_one_more() -> None:
    capacity = EngineCapacity(lm_songs=64, pack_s=600)
    stages = StageLimits(lambda: capacity)
    first = [JobPlaces(stages, JOB) for _ in range(10)]
    for each in first:
        await each.plan()
    assert stages.wanted == 64 - 10 + 1
    capacity = replace(capacity, lm_songs=7 + 1, lm_waiting=3)  # as it is told while 7 are written
    late = asyncio.create_task(JobPlaces(stages, JOB).plan())
    await settled()
    assert (late.done(), stages.waiting["plan"], stages.wanted) == (False, 4, -3)
    for each in first[:3]:
        with each:
            pass
    await settled()
    assert late.done()


@pytest.mark.parametrize("job", [admitted_job(), JOB], ids=["without a language model", "with one"])
async def test_a_job_alone_never_waits_whatever_the_limits(job: Job) -> None:
    stages = StageLimits(lambda: EngineCapacity(lm_songs=1, lm_waiting=5, pack_s=0.001, encoders=1))
    heavy = replace(job, seeds=(1, 2, 3, 4, 5, 6, 7, 8))
    with stages.job(heavy) as places:
        coroutine = render(places)
        with pytest.raises(StopIteration):  # it runs to its end without giving way once
            coroutine.send(None)
        assert stages.gate("plan").jobs == 0
    assert stages.gate("render").jobs == 0


async def test_engines_that_do_not_tell_limit_nothing_and_want_nothing() -> None:
    stages = StageLimits()
    jobs = [JobPlaces(stages, JOB) for _ in range(200)]
    for each in jobs:
        await render(each)
    assert (stages.wanted, stages.limits["render"], stages.waiting["render"]) == (None, None, 0)
