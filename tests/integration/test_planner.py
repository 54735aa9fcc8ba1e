# SPDX-License-Identifier: Apache-2.0
"""The planner process with the tiny language model: pipe, grammar and guidance are real, the weights random."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from acestep_consumer.concurrency.priority import rank_of
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.audio_codes import format_codes, parse_codes
from acestep_consumer.domain.errors import InvalidRequest
from acestep_consumer.domain.job import Job, Plan, Request, Sources, TokenizedSource
from acestep_consumer.domain.stages import EngineCapacity
from acestep_consumer.engine.adapters import PlannerSupervisor, RendererSupervisor
from acestep_consumer.engine.messages import Configure, ConfigurePlanner
from acestep_consumer.engine.planner.metadata import Metadata
from acestep_consumer.engine.supervisor import EngineUnusable
from acestep_consumer.execution.stage_limits import StageLimits
from acestep_consumer.policy.admit import Limits, admit
from acestep_schemas.events import LmChoice
from acestep_schemas.request import parse_request
from tests.support.admission import make_limits
from tests.support.waiting import WITHIN_S, eventually

LM = LmChoice(model="acestep-5Hz-lm-0.6B", backend="pt")
SHORT = {"use_cot_caption": False, "use_cot_language": False, "audio_duration": 10}
"""Keeps the tiny model's thoughts short: it would fill every line of a caption."""


def limits() -> Limits:
    return replace(make_limits(), lm=LM)


def job(**fields: object) -> Job:
    body, warnings = parse_request({"prompt": "slow jazz", "lyrics": "la la", **SHORT, **fields})
    return admit(Request("task-1", body, warnings), limits())


def codes_in(plan: Plan) -> list[int]:
    return [len(parse_codes(codes)) for codes in plan.audio_codes]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def planner(tiny_checkpoints: Path) -> AsyncIterator[PlannerSupervisor]:
    engine = PlannerSupervisor(
        ConfigurePlanner(model=LM.model, backend="pt", memory_gb=2, device="cpu", checkpoint_dir=tiny_checkpoints),
        max_attempts=2,
    )
    await engine.start()
    yield engine
    await engine.stop()


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def plan_for(planner: PlannerSupervisor, source: TokenizedSource | None = None, **fields: object) -> Plan:
    async with asyncio.timeout(600):
        return await planner.plan_songs(job(**fields), source, lambda *_: None)


async def test_thinking_gives_metadata_and_exactly_five_codes_a_second(planner: PlannerSupervisor) -> None:
    plan = await plan_for(planner, thinking=True)
    assert codes_in(plan) == [50]
    metas = plan.metas
    assert metas.duration == 10
    Metadata(bpm=metas.bpm, keyscale=metas.keyscale, timesignature=metas.timesignature)  # raises outside the ranges
    assert (metas.caption, metas.lyrics) == ("slow jazz", "la la")


async def test_what_the_request_gives_is_never_overwritten(planner: PlannerSupervisor) -> None:
    plan = await plan_for(planner, thinking=True, bpm=99, key_scale="F# minor", time_signature="3", audio_duration=12)
    metas = plan.metas
    assert (metas.bpm, metas.keyscale, metas.timesignature, metas.duration) == (99, "F# minor", "3", 12)


async def test_a_duration_that_is_left_open_is_planned_within_the_tiers_limit(planner: PlannerSupervisor) -> None:
    plans = await asyncio.gather(
        *(plan_for(planner, analysis_only=True, audio_duration=None, seed=seed) for seed in range(4))
    )
    most = limits().tier.max_seconds_with_lm
    assert all(plan.metas.duration is not None and 10 <= plan.metas.duration <= most for plan in plans)
    assert all(plan.audio_codes == () for plan in plans)


async def test_the_same_seed_gives_the_same_plan_whatever_else_is_written(planner: PlannerSupervisor) -> None:
    alone = await plan_for(planner, thinking=True, seed=3)
    together = await asyncio.gather(*(plan_for(planner, thinking=True, seed=seed) for seed in range(6)))
    assert together[3] == alone
    assert len({plan.audio_codes for plan in together}) == 6


async def test_a_batch_has_one_metadata_and_codes_for_each_song(planner: PlannerSupervisor) -> None:
    plan = await plan_for(planner, thinking=True, batch_size=3, seed=[1, 2, 3])
    assert codes_in(plan) == [50, 50, 50]
    assert len(set(plan.audio_codes)) == 3
    sequentially = await plan_for(planner, thinking=True, batch_size=3, seed=[1, 2, 3], allow_lm_batch=False)
    assert sequentially.audio_codes == plan.audio_codes


async def test_without_thinking_missing_metadata_is_completed_and_no_codes_are_written(
    planner: PlannerSupervisor,
) -> None:
    plan = await plan_for(planner, bpm=120)
    assert plan.audio_codes == ()
    assert plan.metas.bpm == 120
    assert plan.metas.keyscale


async def test_a_caption_may_be_rewritten_only_when_allowed(planner: PlannerSupervisor) -> None:
    rewritten = await plan_for(planner, analysis_only=True, use_cot_caption=True)
    formatted = await plan_for(planner, analysis_only=True, use_cot_caption=True, is_format_caption=True)
    assert rewritten.metas.caption != "slow jazz"
    assert formatted.metas.caption == "slow jazz"


async def test_texts_are_created_formatted_and_derived_from_audio_codes(planner: PlannerSupervisor) -> None:
    """Concurrently, because the tiny model's lyrics never end: they are truncated at what the DiT would read."""
    source = TokenizedSource(codes=format_codes(range(60)), source_s=12.2)
    invented, rewritten, described = await asyncio.gather(
        plan_for(planner, sample_query="a sea shanty", lyrics="", analysis_only=True, key_scale="D dorian"),
        plan_for(planner, use_format=True, analysis_only=True, key_scale="C major"),
        plan_for(planner, source, full_analysis_only=True, src_audio_path="s3://b/song.wav", audio_duration=None),
    )
    assert invented.warnings[0] == "key_scale = D dorian was not used: in sample mode the language model decides it"
    assert invented.metas.keyscale != "D dorian"
    assert invented.metas.caption not in ("", "slow jazz")
    assert rewritten.metas.keyscale == "C major"
    assert described.metas.duration
    assert all(plan.metas.lyrics not in ("", "la la") for plan in (invented, rewritten, described))


async def test_progress_counts_codes(planner: PlannerSupervisor) -> None:
    progress: list[float] = []
    async with asyncio.timeout(600):
        await planner.plan_songs(job(thinking=True), None, lambda fraction, _: progress.append(fraction))
    assert progress == sorted(progress)
    assert len(progress) > 5
    assert 0.5 < progress[-1] <= 1


async def test_a_cancelled_job_stops_and_the_others_go_on(planner: PlannerSupervisor) -> None:
    began = asyncio.Event()
    endless = asyncio.create_task(
        planner.plan_songs(job(thinking=True, audio_duration=480), None, lambda *_: began.set())
    )
    async with asyncio.timeout(WITHIN_S):
        await began.wait()
    endless.cancel()
    await asyncio.wait((endless,))
    assert endless.cancelled()
    assert codes_in(await plan_for(planner, thinking=True)) == [50]


async def test_a_job_that_cannot_be_planned_fails_alone(planner: PlannerSupervisor) -> None:
    long = plan_for(planner, thinking=True, lyrics="la " * 10_000)
    fine = plan_for(planner, thinking=True)
    broken, plan = await asyncio.gather(long, fine, return_exceptions=True)
    assert isinstance(broken, InvalidRequest)
    assert isinstance(plan, Plan)


async def test_an_offloaded_model_gives_the_same_plan(planner: PlannerSupervisor, tiny_checkpoints: Path) -> None:
    configure = ConfigurePlanner(
        model=LM.model, backend="pt", memory_gb=2, device="cpu", checkpoint_dir=tiny_checkpoints, offload=True
    )
    offloaded = PlannerSupervisor(configure, max_attempts=1)
    await offloaded.start()
    try:
        assert await plan_for(offloaded, thinking=True, seed=5) == await plan_for(planner, thinking=True, seed=5)
    finally:
        await offloaded.stop()


async def test_a_model_that_is_nowhere_says_where_it_was_looked_for(tiny_checkpoints: Path) -> None:
    configure = ConfigurePlanner(model="acestep-5Hz-lm-9B", memory_gb=2, checkpoint_dir=tiny_checkpoints)
    engine = PlannerSupervisor(configure, max_attempts=1)
    with pytest.raises(EngineUnusable, match="acestep-5Hz-lm-9B is not found"):
        await engine.start()
    await engine.stop()


async def test_a_backend_that_is_not_there_is_refused_when_insisted_on_and_replaced_otherwise(
    tiny_checkpoints: Path,
) -> None:
    configure = ConfigurePlanner(model=LM.model, memory_gb=2, device="cpu", checkpoint_dir=tiny_checkpoints)
    insisting = PlannerSupervisor(replace(configure, backend="vllm"), max_attempts=1)
    with pytest.raises(EngineUnusable, match="vllm"):
        await insisting.start()
    await insisting.stop()
    provisional = replace(configure, model="", wait=True)
    flexible = PlannerSupervisor(provisional, max_attempts=1)
    starting = asyncio.create_task(flexible.start())
    await eventually(lambda: "imports" in flexible.start_seconds)
    assert not starting.done()
    flexible.configure(replace(configure, wait=True))
    flexible.renderer_is_up()
    report = await starting
    await flexible.stop()
    assert report.backend == "pt"
    assert "vllm" in report.warnings[0]
    assert list(flexible.start_seconds) == ["imports", "waiting", "models", "warm-up"]


async def test_both_engines_take_what_their_stages_have_room_for_and_the_highest_priority_next(
    planner: PlannerSupervisor, tiny_checkpoints: Path, tmp_path: Path
) -> None:
    """Places for 3 songs in the language model and 2 in the renderer; the job that comes last has priority 9."""
    settings = EngineSettings(checkpoint_dir=tiny_checkpoints, device="cpu", compile=False, encoders=1)
    renderer = RendererSupervisor(Configure(settings=settings), max_attempts=2)
    stages = StageLimits(lambda: EngineCapacity(lm_songs=3, pack_s=0.1, encoders=1))
    planned: list[int] = []
    most = dict.fromkeys(("plan", "render", "encode"), 0)

    def note(_fraction: float, _stage: str) -> None:
        for stage in most:
            most[stage] = max(most[stage], stages.gate(stage).jobs)

    async def sing(number: int, priority: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        asked = replace(job(thinking=True, inference_steps=2, audio_format="wav"), rank=rank_of(priority, number))
        with stages.job(asked) as places:
            await places.plan()
            planned.append(number)
            plan = await planner.plan_songs(asked, None, note)
            await places.render(plan)
            rendering = await renderer.render(asked, plan, Sources(), folder, places.rendering(note))
            await places.upload()
        assert rendering.tracks[0].path.stat().st_size > 10_000

    try:
        report = await renderer.start()
        assert report.encoders == 1
        async with asyncio.timeout(600):
            await asyncio.gather(*(sing(number, 9 if number == 6 else 0) for number in range(7)))
    finally:
        await renderer.stop()
    assert planned == [0, 1, 2, 6, 3, 4, 5]
    assert (most["plan"], most["render"]) == (3, 2)
    assert most["encode"] > 0  # its encoder is told to be free before the song's job is told to be done
    assert [stages.gate(stage).jobs for stage in ("plan", "render", "encode", "upload")] == [0, 0, 0, 0]
    assert set(stages.waiting.values()) == {0}
