# SPDX-License-Identifier: Apache-2.0
"""Several jobs are in a process that dies: the one that kills it is found, the others are done."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from acestep_consumer.domain.errors import EngineCrashed
from acestep_consumer.engine.supervisor import EngineState
from tests.support.engines import RequestLog, meet, render, supervised
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("quick_restarts")


async def test_of_several_the_one_that_kills_is_found_and_the_others_are_done_before_anybody_new(
    tmp_path: Path,
) -> None:
    log_file = RequestLog(tmp_path / "requests.log")
    async with supervised(max_attempts=2) as engine:
        innocent = [meet(engine, tmp_path, 4, seed) for seed in (1, 2)]
        culprit = meet(engine, tmp_path, 4, 3, fatal=True)
        await eventually(lambda: len(log_file.entries) == 3)
        innocent.append(meet(engine, tmp_path, 4, 4))
        await eventually(lambda: engine.restarts)
        new = [meet(engine, tmp_path, 4, seed) for seed in (5, 6)]
        with pytest.raises(EngineCrashed, match="died 2 times with this job inside; the last time it ended with"):
            await culprit
        await asyncio.gather(*innocent, *new)
    together, *later = log_file.processes
    assert sorted(together) == [1, 2, 3, 4]
    # The culprit dies twice more, alone; of the others each is rendered once more.
    assert engine.restarts == 3
    assert sorted(seed for process in later for seed in process) == [1, 2, 3, 3, 4, 5, 6]
    order = [seed for process in later for seed in process]
    assert set(order[-2:]) == {5, 6}
    # Until the new ones came, everybody was alone.
    suspects = 4 + next(i for i, (_, way, seed) in enumerate(log_file.entries[4:]) if way == "in" and seed in {5, 6})
    for pid in {pid for pid, _, _ in log_file.entries[4:suspects]}:
        ways = [(way, seed) for process, way, seed in log_file.entries[4:suspects] if process == pid]
        assert all(ways[at + 1] == ("out", seed) for at, (way, seed) in enumerate(ways[:-1]) if way == "in")


async def test_a_neighbours_crash_does_not_count(tmp_path: Path) -> None:
    """Each has one try, and nobody but the culprit has used it when the process dies with all of them."""
    async with supervised(max_attempts=1) as engine:
        neighbours = [meet(engine, tmp_path, 3, seed) for seed in (1, 2)]
        culprit = meet(engine, tmp_path, 3, 3, fatal=True)
        for rendering in await asyncio.gather(*neighbours):
            assert rendering.tracks
        with pytest.raises(EngineCrashed, match="died once"):
            await culprit


async def test_a_process_that_is_killed_from_outside_costs_nobody_in_it_a_try(tmp_path: Path) -> None:
    log_file = RequestLog(tmp_path / "requests.log")
    async with supervised(max_attempts=1) as engine:
        jobs = [meet(engine, tmp_path, 4, seed) for seed in (1, 2, 3)]
        await eventually(lambda: len(log_file.entries) == 3)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        assert all(rendering.tracks for rendering in await asyncio.gather(*jobs))
    assert [len(process) for process in log_file.processes] == [3, 3]


async def test_a_suspect_that_is_cancelled_lets_the_others_go_on(tmp_path: Path) -> None:
    log_file = RequestLog(tmp_path / "requests.log")
    async with supervised(max_attempts=1) as engine:
        waiting = asyncio.create_task(render(engine, tmp_path, f"wait {tmp_path / 'never'}"))
        await eventually((tmp_path / "never.began").exists)
        innocent = [meet(engine, tmp_path, 2, seed) for seed in (1,)]
        await eventually(lambda: len(log_file.entries) == 1)
        (tmp_path / "never.began").unlink()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await eventually((tmp_path / "never.began").exists)
        innocent.append(meet(engine, tmp_path, 2, 2))
        waiting.cancel()
        await asyncio.gather(*innocent)
    assert engine.restarts == 1


async def test_two_engines_that_die_again_and_again_lose_no_job(tmp_path: Path) -> None:
    """Nobody is blamed often enough to fail, and what is done stays done."""
    async with supervised(max_attempts=20) as one, supervised(max_attempts=20) as other:
        engines = (one, other)
        jobs = []
        for number in range(12):
            folder = tmp_path / str(number)
            folder.mkdir()
            jobs.append(asyncio.create_task(render(engines[number % 2], folder, "sing", seed=number)))
        for _ in range(3):
            for engine in engines:
                await eventually(lambda engine=engine: engine.ready and engine.pid)  # type: ignore[misc]  # mypy knows no default here
                killed = engine.pid
                assert killed is not None
                os.kill(killed, signal.SIGKILL)
                # Not until it is not ready: the next one may be ready before that is seen.
                await eventually(lambda engine=engine, killed=killed: engine.pid != killed)  # type: ignore[misc]  # as above
        renderings = await asyncio.gather(*jobs)
        await eventually(lambda: one.ready and other.ready)
        assert [rendering.tracks[0].seed for rendering in renderings] == list(range(12))
        assert [engine.state for engine in engines] == [EngineState(ready=True, restarts=3)] * 2
