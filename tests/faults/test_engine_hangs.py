# SPDX-License-Identifier: Apache-2.0
"""An engine process that hangs is killed and replaced, and its jobs are done by the next one."""

import asyncio
import signal
from pathlib import Path

import pytest

from acestep_consumer.domain.errors import EngineCrashed
from tests.support.broker import Peer
from tests.support.engines import (
    ONE_MODEL,
    RequestLog,
    ends,
    meet,
    render,
    signal_engine,
    state_of,
    supervised,
)
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import eventually
from tests.support.worker import WorkerProcess, running

pytestmark = pytest.mark.usefixtures("quick_restarts")


async def test_a_process_that_hangs_is_replaced_although_it_sends_stats(tmp_path: Path) -> None:
    async with supervised(hang_s=3) as engine:
        rendering = await render(engine, tmp_path, f"hang-once {tmp_path / 'mark'}")
        assert rendering.tracks
        assert engine.restarts == 1


async def test_a_job_that_hangs_every_process_fails_and_the_reason_names_the_setting(tmp_path: Path) -> None:
    async with supervised(max_attempts=2, hang_s=0.3) as engine:
        with pytest.raises(EngineCrashed, match=r"died 2 times .* no progress for 0.3 s \(ACESTEP_ENGINE_HANG_S\)"):
            await render(engine, tmp_path, f"deaf {tmp_path / 'mark'}")


async def test_a_process_that_does_not_end_a_stopped_request_is_replaced(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    async with supervised(max_attempts=1, stop_s=0.3) as engine:
        deaf = asyncio.create_task(render(engine, tmp_path, f"deaf {mark}"))
        neighbour = meet(engine, tmp_path, 2, 1)
        await eventually(lambda: mark.exists() and RequestLog(tmp_path / "requests.log").entries)
        mark.unlink()
        deaf.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deaf
        await eventually(lambda: engine.restarts == 1 and engine.ready)
        other = meet(engine, tmp_path, 2, 2)
        assert all(rendering.tracks for rendering in await asyncio.gather(neighbour, other))
    assert not mark.exists(), "the stopped request was tried again"


async def test_a_process_that_answers_a_stopped_request_stays(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    async with supervised(stop_s=3) as engine:
        pid = engine.pid
        task = asyncio.create_task(render(engine, tmp_path, f"wait {mark}"))
        await eventually(mark.with_suffix(".began").exists)
        task.cancel()
        await eventually(mark.exists)
        await eventually(lambda: not engine._requests)
        await render(engine, tmp_path, "sing")
        assert engine.pid == pid


async def test_a_renderer_that_stands_still_is_replaced_under_a_worker(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    """SIGSTOP: the process is there, its pipe is open, and it says nothing."""
    url = own_worker_environment["ACESTEP_AMQP_URL"]
    worker = WorkerProcess(tmp_path, own_worker_environment | ONE_MODEL | {"ACESTEP_ENGINE_HANG_S": "20"})
    async with running(worker), EventRecorder(url) as recorder, Peer(url) as peer:
        # Stopped before it has the job, and a short song: with a long one a busy machine seems to hang once more, and a
        # short one is done before it can be stopped.
        signal_engine(worker, "renderer", signal.SIGSTOP)
        await peer.submit(task_id="stands-still", audio_duration=10)
        await eventually(lambda: recorder.terminal("stands-still"), 240)
        assert state_of(worker, "renderer") == {"ready": True, "restarts": 1}
        assert worker.log_lines(event="engine process is killed", engine="renderer")
    assert ends(recorder, ["stands-still"]) == {"stands-still": ["completed"]}
