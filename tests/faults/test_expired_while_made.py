# SPDX-License-Identifier: Apache-2.0
"""A worker is cut off while it makes a song, and the broker or another worker ends its message: one end is told."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import aio_pika
import pytest

from acestep_consumer.broker.topology import CONTROL, DEAD_LETTER, GENERATE
from tests.support.broker import until
from tests.support.faulty_s3 import s3_error
from tests.support.scenario import Scenario, scenario
from tests.support.servers import ManagementApi
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

EXPIRES_S = 1.0
# A worker that died is given up after 5 s, in place of 45.
BRISK = {"LIGHT_PACE": "9"}
GIVEN_UP_S = 5
KINDS = pytest.mark.parametrize("kind", ["classic", pytest.param("quorum", marks=pytest.mark.broker_versions)])


def settings(environment: dict[str, str], kind: str = "classic") -> dict[str, str]:
    return environment | BRISK | {"ACESTEP_QUEUE_TYPE": kind, "ACESTEP_WORKER_ID": "second"}


@asynccontextmanager
async def making(
    variables: dict[str, str], folder: Path, *, stamped: bool = False, **properties: Any
) -> AsyncIterator[Scenario]:
    """Have a worker between proxies make a song until ``go`` exists. The second worker is not there yet.

    ``stamped``: the message says when it was sent.
    """
    async with scenario(variables, folder, ACESTEP_WORKER_ID="first") as seen:
        await seen.consumes()
        properties |= {"timestamp": datetime.now(UTC)} if stamped else {}
        await seen.peer.request(body_of(folder / "go", **properties.pop("fields", {})), message_id="song", **properties)
        await eventually(lambda: "started" in seen.recorder.states("song"), WITHIN_S)
        yield seen


def second(variables: dict[str, str], folder: Path) -> AbstractAsyncContextManager[WorkerProcess]:
    own = folder / "second"
    own.mkdir()
    return running(WorkerProcess(own, variables, light=True))


def body_of(go: Path, **fields: Any) -> bytes:
    body = {"task_id": "song", "prompt": f"until={go}", "audio_format": "wav", "audio_duration": 10, **fields}
    return json.dumps(body).encode()


async def past(seconds: float) -> None:
    """Wait until a time that is so far ahead has passed."""
    at = time.monotonic() + seconds
    await eventually(lambda: time.monotonic() > at, WITHIN_S)


async def given_up(seen: Scenario) -> bool:
    """Whether the broker has taken the message from the queue: its dead letter is there."""
    return await seen.peer.ready(DEAD_LETTER) == 1


async def looks(seen: Scenario, worker: WorkerProcess) -> None:
    """Wait until the second worker waits for the first one, and tells nothing."""

    def waits_or_tells() -> bool:
        return bool(worker.log_lines(event="waiting for another worker's attempt") or seen.recorder.terminal("song"))

    await eventually(waits_or_tells, WITHIN_S)
    assert seen.recorder.terminal("song") == []


async def nothing_left(seen: Scenario) -> bool:
    return await seen.object_store.names("song") == {"manifest.json"}


def ends(seen: Scenario) -> set[tuple[str, bytes]]:
    return {(event.state, event.body) for event in seen.recorder.terminal("song")}


async def back_and_told_again(seen: Scenario, times: int) -> None:
    """Let the first worker reach the broker again, and wait until it has told its end, too."""
    seen.amqp.heal()
    await eventually(lambda: len(seen.recorder.terminal("song")) == times, WITHIN_S)


@KINDS
async def test_a_message_that_expires_while_a_cut_off_worker_makes_its_song_ends_with_the_song(
    kind: str, service_environment: dict[str, str], tmp_path: Path
) -> None:
    variables = settings(service_environment, kind)
    async with making(variables, tmp_path, expiration=EXPIRES_S) as seen, second(variables, tmp_path) as other:
        await past(EXPIRES_S)
        seen.amqp.refuse()
        await until(partial(given_up, seen), "the message has expired")
        await looks(seen, other)
        await past(2 * GIVEN_UP_S)
        assert seen.recorder.terminal("song") == []
        (tmp_path / "go").touch()
        await seen.all_ended("song")
        await back_and_told_again(seen, 2)
        await seen.assert_completed_once("song")
        assert await seen.object_store.names("song") == {"0.wav", "manifest.json"}


async def test_a_message_that_expires_after_its_worker_was_killed_is_told_all_the_same(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    variables = settings(service_environment)
    async with making(variables, tmp_path, expiration=EXPIRES_S) as seen, second(variables, tmp_path) as other:
        await past(EXPIRES_S)
        seen.worker.kill()
        await looks(seen, other)
        await seen.all_ended("song")
        assert [event.state for event in seen.recorder.terminal("song")] == ["expired"]
        await until(partial(nothing_left, seen), "the attempt's record is removed")
        assert (await seen.peer.take(DEAD_LETTER)).message_id == "song"


async def test_a_cut_off_worker_that_had_not_begun_leaves_the_message_to_its_expiration(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    """Its attempt is recorded after the expiration was told: neither of the two looks at the right moment."""
    variables = settings(service_environment)
    async with scenario(variables, tmp_path, ACESTEP_WORKER_ID="first") as seen:
        await seen.consumes()
        (tmp_path / "go").touch()
        with seen.s3.hold(lambda request: request.method == "PUT" and "/attempts/" in request.path) as hold:
            await seen.peer.request(body_of(tmp_path / "go"), message_id="song", expiration=EXPIRES_S)
            await eventually(lambda: hold.waiting, WITHIN_S)
            await past(EXPIRES_S)
            seen.amqp.refuse()
            async with second(variables, tmp_path):
                await seen.all_ended("song")
        seen.amqp.heal()
        settled = "stale delivery not settled; it will be redelivered"
        await eventually(lambda: seen.worker.log_lines(event=settled), WITHIN_S)
        await seen.is_ready()
        assert seen.recorder.states("song") == ["expired"]
        assert "0.wav" not in await seen.object_store.names("song")


async def test_a_worker_that_nobody_could_see_yields_to_the_expiration_that_was_told(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    """It has lost its storage as well, so that nothing says that it lives."""
    variables = settings(service_environment)
    async with making(variables, tmp_path, expiration=EXPIRES_S) as seen, second(variables, tmp_path):
        await past(EXPIRES_S)
        with seen.s3.fault(lambda _: s3_error(503, "SlowDown")):
            seen.amqp.refuse()
            await seen.all_ended("song")
        (tmp_path / "go").touch()
        await back_and_told_again(seen, 2)
        assert [state for state, _ in ends(seen)] == ["expired"]


async def test_a_deadline_that_passes_while_a_cut_off_worker_makes_the_song_does_not_end_it(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    variables = settings(service_environment)
    late = {"queue_deadline_s": 5}
    async with (
        making(variables, tmp_path, stamped=True, fields=late) as seen,
        second(variables, tmp_path) as other,
    ):
        await past(6)
        seen.amqp.refuse()
        await looks(seen, other)
        (tmp_path / "go").touch()
        await seen.all_ended("song")
        await back_and_told_again(seen, 2)
        await seen.assert_completed_once("song")


async def test_a_cut_off_worker_yields_to_the_one_that_rejected_its_message(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    """The second worker has a smaller card."""
    variables = settings(service_environment)
    fields = {"audio_duration": 400, "on_limit": "reject"}
    small = variables | {"MAX_CUDA_VRAM": "4"}
    async with making(variables, tmp_path, fields=fields) as seen, second(small, tmp_path):
        seen.amqp.refuse()
        await seen.all_ended("song")
        (tmp_path / "go").touch()
        await back_and_told_again(seen, 2)
        assert [state for state, _ in ends(seen)] == ["rejected"]


async def test_a_cut_off_worker_yields_to_a_cancellation_that_it_has_not_heard(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    variables = settings(service_environment)
    async with making(variables, tmp_path, stamped=True) as seen, second(variables, tmp_path):
        seen.amqp.refuse()
        control = await seen.peer.channel.get_exchange(CONTROL, ensure=False)
        await control.publish(aio_pika.Message(b"", timestamp=datetime.now(UTC)), "cancel.song")
        await seen.all_ended("song")
        (tmp_path / "go").touch()
        await eventually(
            lambda: ("PUT", f"/{seen.object_store.bucket}/{seen.object_store.prefix}/song/0.wav") in seen.s3.requests
        )
        await back_and_told_again(seen, 2)
        assert [state for state, _ in ends(seen)] == ["cancelled"]


@pytest.mark.broker_versions
async def test_a_message_over_an_operators_delivery_limit_ends_with_the_song_of_its_cut_off_worker(
    service_environment: dict[str, str], tmp_path: Path, management: ManagementApi, amqp_vhost: str
) -> None:
    variables = settings(service_environment, "quorum")
    policy = {"pattern": f"^{GENERATE}$", "definition": {"delivery-limit": 0}, "apply-to": "queues", "priority": 99}
    async with making(variables, tmp_path) as seen:
        await asyncio.to_thread(management.call, "PUT", f"/api/policies/{amqp_vhost}/strict", policy)
        async with second(variables, tmp_path) as other:
            seen.amqp.refuse()
            await until(partial(given_up, seen), "the message is dead-lettered")
            await looks(seen, other)
            (tmp_path / "go").touch()
            await seen.all_ended("song")
            await back_and_told_again(seen, 2)
            await seen.assert_completed_once("song")
