# SPDX-License-Identifier: Apache-2.0
"""The supervisor against real child processes that behave and misbehave on request."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from acestep_consumer.domain.errors import EngineCrashed, Interrupted, RenderFailed
from acestep_consumer.domain.job import Plan, Sources
from acestep_consumer.engine.process import EngineProcess
from acestep_consumer.engine.supervisor import EngineUnusable
from acestep_schemas.events import Metas
from tests.support.admission import admitted_job
from tests.support.engine_stats import engine_stats
from tests.support.engines import render, supervised, supervisor
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("forked_processes", "quick_restarts")


async def test_a_job_comes_back_with_its_songs_and_its_progress(tmp_path: Path) -> None:
    progress: list[tuple[float, str]] = []
    async with supervised() as engine:
        job = admitted_job(prompt="sing", batch_size=2, seed=5)
        plan = Plan(metas=Metas())
        rendering = await engine.render(job, plan, Sources(), tmp_path, lambda *update: progress.append(update))
    assert [track.seed for track in rendering.tracks] == [5, 6]
    assert all(track.path.is_file() for track in rendering.tracks)
    assert progress == [(0.25, "render"), (0.5, "render"), (0.75, "render"), (1.0, "render")]


async def test_ctrl_c_does_not_reach_children_that_are_still_importing() -> None:
    mine = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    starts = [EngineProcess.start("tests.support.engine_double") for _ in range(2)]
    processes = await asyncio.gather(*starts)
    try:
        for process in processes:
            status = await asyncio.to_thread(Path(f"/proc/{process.pid}/status").read_text)
            (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
            assert int(blocked, 16) & (1 << (signal.SIGINT - 1))
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mine, "the consumer hears it again"
    finally:
        for process in processes:
            await process.end()


async def test_many_jobs_share_one_process_and_get_their_own_answers(tmp_path: Path) -> None:
    async with supervised() as engine:
        folders = [tmp_path / str(seed) for seed in range(20)]
        for folder in folders:
            folder.mkdir()
        renderings = await asyncio.gather(
            *(render(engine, folder, "sing", seed=seed) for seed, folder in enumerate(folders))
        )
    assert [rendering.tracks[0].seed for rendering in renderings] == list(range(20))


async def test_a_job_that_breaks_fails_alone(tmp_path: Path) -> None:
    async with supervised() as engine:
        pid = engine.pid
        with pytest.raises(RenderFailed, match="it broke"):
            await render(engine, tmp_path, "fail")
        await render(engine, tmp_path, "sing")
        assert engine.pid == pid


async def test_a_job_whose_process_dies_is_tried_again_on_the_next_one(tmp_path: Path) -> None:
    async with supervised() as engine:
        rendering = await render(engine, tmp_path, f"crash-once {tmp_path / 'mark'}")
        assert rendering.tracks
        assert engine.restarts == 1


async def test_a_job_that_kills_every_process_fails_after_its_attempts(tmp_path: Path) -> None:
    async with supervised(max_attempts=2) as engine:
        with pytest.raises(EngineCrashed, match="died 2 times with this job inside"):
            await render(engine, tmp_path, "crash")


async def test_stats_are_kept_until_the_process_is_replaced_and_totals_beyond(tmp_path: Path) -> None:
    async with supervised() as engine:
        assert (engine.usage.stats, engine.usage.audio_s) == (None, 0)
        await render(engine, tmp_path, "tell", batch_size=2)
        assert engine.usage.stats == engine_stats(songs_done=2)
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: engine.pid != pid)
        await eventually(lambda: engine.usage.stats is None)
        assert engine.usage.audio_s == 120
        await eventually(lambda: engine.ready)
        await render(engine, tmp_path, "tell")
        assert engine.usage.audio_s == 240


async def test_cancelling_a_job_stops_its_work_in_the_process(tmp_path: Path) -> None:
    mark = tmp_path / "stopped"
    async with supervised() as engine:
        task = asyncio.create_task(render(engine, tmp_path, f"wait {mark}"))
        await eventually(mark.with_suffix(".began").exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(mark.exists)


async def test_stopping_the_supervisor_interrupts_what_is_open_and_ends_the_process(tmp_path: Path) -> None:
    engine = supervisor()
    await engine.start()
    task = asyncio.create_task(render(engine, tmp_path, f"wait {tmp_path / 'never'}"))
    await eventually((tmp_path / "never.began").exists)
    pid = engine.pid
    await engine.stop()
    with pytest.raises(Interrupted):
        await task
    await eventually(lambda: not Path(f"/proc/{pid}").exists())


async def test_an_engine_that_cannot_start_says_why() -> None:
    engine = supervisor("missing")
    with pytest.raises(EngineUnusable, match="no checkpoint named missing"):
        await engine.start()
    await engine.stop()


async def test_an_engine_that_dies_while_loading_is_given_up_after_some_tries() -> None:
    engine = supervisor("dies-while-loading")
    with pytest.raises(EngineUnusable, match="died 3 times while loading"):
        await engine.start()
    await engine.stop()


async def test_an_engine_does_not_outlive_its_consumer(tmp_path: Path) -> None:
    """The pipe's end is the signal: here it is closed the way a killed consumer's would be."""
    engine = supervisor()
    await engine.start()
    pid = engine.pid
    assert engine._process is not None
    engine._process._writer.transport.abort()
    await eventually(lambda: not Path(f"/proc/{pid}").exists() or engine.pid != pid)
    await engine.stop()


async def test_a_memory_share_holds_for_every_later_process(tmp_path: Path) -> None:
    async with supervised() as engine:
        for share in (16.0, 10.5):
            engine.set_memory_share(share)
            await render(engine, tmp_path, "tell")
            assert engine.usage.stats is not None
            assert engine.usage.stats.memory_limit_gb == share
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await eventually(lambda: engine.restarts and engine.ready)
        await render(engine, tmp_path, "tell")
        assert engine.usage.stats is not None
        assert engine.usage.stats.memory_limit_gb == 10.5


async def test_a_job_may_have_fewer_tries_than_the_worker_gives(tmp_path: Path) -> None:
    async with supervised(max_attempts=5) as engine:
        job = replace(admitted_job(prompt="crash"), tries=1)
        with pytest.raises(EngineCrashed, match="died once with this job inside"):
            await engine.render(job, Plan(metas=Metas()), Sources(), tmp_path, lambda *_: None)
        await eventually(lambda: engine.ready)
        assert engine.restarts == 1


async def test_a_process_that_talks_nonsense_is_replaced(tmp_path: Path) -> None:
    async with supervised() as engine:
        rendering = await render(engine, tmp_path, f"rant-once {tmp_path / 'mark'}")
        assert rendering.tracks
        assert engine.restarts == 1


async def test_an_engine_gets_no_keys_to_the_broker_or_to_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACESTEP_AMQP_URL", "ACESTEP_AMQP_URL_FILE", "ACESTEP_MANAGEMENT_URL", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "sesame")
    monkeypatch.setenv("HF_HOME", "needed")
    process = await EngineProcess.start("tests.support.engine_double")
    read = Path(f"/proc/{process.pid}/environ").read_bytes
    await eventually(lambda: b"HF_HOME=needed" in read())
    assert b"sesame" not in read()
    await process.end()


async def test_the_log_level_reaches_the_process_and_those_that_replace_it(tmp_path: Path) -> None:
    async with supervised() as engine:
        for name, prompt in (("now", "sing"), ("later", f"crash-once {tmp_path / 'mark'}")):
            engine.set_log_level("debug" if name == "now" else "warning")
            await render(engine, tmp_path, prompt)
            await render(engine, tmp_path, f"log-level {tmp_path / name}")
        assert engine.restarts == 1
    assert (tmp_path / "now").read_text() == "debug"
    assert (tmp_path / "later").read_text() == "warning"
