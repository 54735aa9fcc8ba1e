# SPDX-License-Identifier: Apache-2.0
"""kill -9 of the worker at each stage of a job: the next worker ends it, once, whatever the dead one had done."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from acestep_consumer.broker.topology import DEAD_LETTER
from tests.support.proxy import Direction, Where
from tests.support.scenario import CONSUMING, PUBLISHING, Scenario, manifest_of, scenario
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

Stage = Callable[[Scenario, Path], AbstractAsyncContextManager[None]]
"""Brings the job to the stage; within the block the worker is there. Afterwards whatever held it lets go."""


@asynccontextmanager
async def before_render(seen: Scenario, folder: Path) -> AsyncIterator[None]:
    with seen.s3.hold(manifest_of("song", "GET")) as hold:
        await seen.peer.submit(task_id="song", batch_size=2)
        await eventually(lambda: hold.waiting, WITHIN_S)
        yield
        await eventually(lambda: not hold.waiting, WITHIN_S)
    assert await seen.object_store.names("song") == set()


@asynccontextmanager
async def in_render(seen: Scenario, folder: Path) -> AsyncIterator[None]:
    go = folder / "go"
    await seen.peer.submit(task_id="song", batch_size=2, prompt=f"until={go}")
    await eventually(lambda: "started" in seen.recorder.states("song"), WITHIN_S)
    yield
    assert await seen.object_store.names("song") == set()
    go.touch()


@asynccontextmanager
async def after_upload(seen: Scenario, folder: Path) -> AsyncIterator[None]:
    with seen.s3.hold(manifest_of("song", "PUT")) as hold:
        await seen.peer.submit(task_id="song", batch_size=2)
        await eventually(lambda: hold.waiting, WITHIN_S)
        yield
        await eventually(lambda: not hold.waiting, WITHIN_S)
    assert await seen.object_store.names("song") == {"0.wav", "1.wav"}


@asynccontextmanager
async def after_manifest(seen: Scenario, folder: Path) -> AsyncIterator[None]:
    with seen.s3.hold(manifest_of("song", "PUT"), answered=True) as hold:
        await seen.peer.submit(task_id="song", batch_size=2)
        await eventually(lambda: hold.waiting, WITHIN_S)
        yield
        await eventually(lambda: not hold.waiting, WITHIN_S)
    assert "manifest.json" in await seen.object_store.names("song")
    assert seen.recorder.terminal("song") == []


@asynccontextmanager
async def after_event(seen: Scenario, folder: Path) -> AsyncIterator[None]:
    """Everybody has heard the event, and its confirm is on the way to the worker."""
    with seen.s3.hold(manifest_of("song", "PUT")) as hold:
        await seen.peer.submit(task_id="song", batch_size=2)
        await eventually(lambda: hold.waiting, WITHIN_S)
        seen.amqp.stall(Where(Direction.DOWN, PUBLISHING))
    await eventually(lambda: seen.amqp.held and seen.recorder.terminal("song"), WITHIN_S)
    yield


@asynccontextmanager
async def before_ack(seen: Scenario, folder: Path) -> AsyncIterator[None]:
    """The event is confirmed, and the ack is on the way to the broker."""
    with seen.s3.hold(manifest_of("song", "PUT")) as hold:
        await seen.peer.submit(task_id="song", batch_size=2)
        await eventually(lambda: hold.waiting, WITHIN_S)
        seen.amqp.stall(Where(Direction.UP, CONSUMING))
    await eventually(lambda: seen.amqp.held and seen.recorder.terminal("song"), WITHIN_S)
    yield


@pytest.mark.parametrize(
    "stage",
    [before_render, in_render, after_upload, after_manifest, after_event, before_ack],
    ids=lambda stage: stage.__name__,
)
async def test_the_next_worker_ends_the_job_of_one_that_was_killed(
    stage: Stage, service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path, ACESTEP_WORKER_ID="doomed") as seen:
        engines = seen.worker.children()
        async with stage(seen, tmp_path):
            seen.worker.kill()
            seen.amqp.cut()
        told_before = len(seen.recorder.terminal("song"))
        async with running(WorkerProcess(tmp_path, service_environment, light=True)):
            await eventually(lambda: len(seen.recorder.terminal("song")) > told_before, WITHIN_S)
        await seen.assert_completed_once("song")
        await seen.assert_nothing_left()
        assert await seen.peer.ready(DEAD_LETTER) == 0
        await eventually(lambda: not [pid for pid in engines if Path(f"/proc/{pid}").exists()])
    assert engines
