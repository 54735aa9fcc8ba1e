# SPDX-License-Identifier: Apache-2.0
"""A stopped request is answered by the real engines, long before the watchdog would kill them."""

import asyncio
from dataclasses import replace
from pathlib import Path

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import Plan, Sources
from acestep_consumer.engine.adapters import PlannerSupervisor, RendererSupervisor
from acestep_consumer.engine.messages import Configure, ConfigurePlanner
from acestep_schemas.events import Metas
from tests.support.admission import admitted_job
from tests.support.waiting import WITHIN_S, eventually


class Seen:
    """Hears progress, and knows whether there was any."""

    any = False

    def __call__(self, *_: object) -> None:
        self.any = True


async def test_the_renderer_answers_a_stopped_request(tiny_checkpoints: Path, tmp_path: Path) -> None:
    settings = EngineSettings(checkpoint_dir=tiny_checkpoints, device="cpu")
    engine, seen = RendererSupervisor(Configure(settings=settings), max_attempts=1), Seen()
    job = admitted_job(prompt="x", audio_duration=120, inference_steps=200)
    await engine.start()
    try:
        task = asyncio.create_task(engine.render(job, Plan(metas=Metas()), Sources(), tmp_path, seen))
        await eventually(lambda: seen.any, 60)
        task.cancel()
        await asyncio.wait((task,))
        assert len(engine._requests) == 1
        await eventually(lambda: not engine._requests, WITHIN_S)
        assert engine.restarts == 0
    finally:
        await engine.stop()


async def test_the_planner_answers_a_stopped_request(tiny_checkpoints: Path) -> None:
    configure = ConfigurePlanner(
        model="acestep-5Hz-lm-0.6B", backend="pt", memory_gb=3, device="cpu", checkpoint_dir=tiny_checkpoints
    )
    engine, seen = PlannerSupervisor(configure, max_attempts=1), Seen()
    job = admitted_job(prompt="x", thinking=False, audio_duration=300)
    thinking = job.request.model_copy(update={"thinking": True})
    await engine.start()
    try:
        task = asyncio.create_task(engine.plan_songs(replace(job, request=thinking), None, seen))
        await eventually(lambda: seen.any, 60)
        task.cancel()
        await asyncio.wait((task,))
        await eventually(lambda: not engine._requests, WITHIN_S)
        assert engine.restarts == 0
    finally:
        await engine.stop()
