# SPDX-License-Identifier: Apache-2.0
"""A worker is told to leave while it runs jobs, whatever else is wrong: nothing is lost, nothing done twice."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from acestep_consumer.broker.topology import GENERATE
from tests.support.broker import Peer, until
from tests.support.event_recorder import EventRecorder
from tests.support.proxy import Proxy
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

RUNNING, WAITING = 2, 2
# Generous for a machine with other things to do, and far from the 600 seconds that running jobs have by default.
AT_ONCE_S = 40.0
# Three connections that wait for a silent broker, one after the other, take longer.
SILENT_CLOSE_S = 5.0
EITHER_SIGNAL = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)


@dataclass
class Scenario:
    """A worker that holds some of the jobs, and eyes on the queue and the events."""

    worker: WorkerProcess
    peer: Peer
    recorder: EventRecorder
    go: Path
    """Once this file is there, running jobs can end."""

    submitted: int = 0

    async def submit(self, count: int) -> None:
        """Send jobs that run until ``go``."""
        for _ in range(count):
            await self.peer.submit(task_id=f"song-{self.submitted}", prompt=f"until={self.go}")
            self.submitted += 1

    async def fill(self) -> None:
        """Send more jobs than the worker may hold; wait until it works on as many as it may."""
        await self.submit(RUNNING + WAITING)
        await eventually(lambda: sum(event.state == "started" for event in self.recorder.events) == RUNNING, WITHIN_S)

    def send(self, number: int) -> None:
        """Send the worker a signal."""
        os.kill(self.worker.process.id.pid, number)

    async def leave(self, within_s: float = WITHIN_S) -> None:
        """Wait for the worker's end, which is a good one."""
        await eventually(lambda: not self.worker.process.running(), within_s)
        assert self.worker.process.returncode() == 0, self.worker.log.read_text()

    async def audit(self, *, done: int) -> None:
        """Look for every job: so many are done, told of once, and all others are back in the queue."""

        async def ready() -> bool:
            return await self.peer.ready(GENERATE) == self.submitted - done

        await until(ready, f"{self.submitted - done} messages ready")
        await eventually(lambda: len(self.ended()) == done)
        assert len(set(self.ended())) == done
        assert all(event.state == "completed" for event in self.recorder.events if event.terminal)

    def ended(self) -> list[str]:
        """The jobs whose end was told, as often as it was."""
        return [event.task_id for event in self.recorder.events if event.terminal]


@asynccontextmanager
async def scenario(
    environment: dict[str, str], folder: Path, *, arguments: Sequence[str] = (), **variables: str
) -> AsyncIterator[Scenario]:
    settings = environment | {"ACESTEP_QUEUE_WORKERS": str(RUNNING)} | variables
    url = environment["ACESTEP_AMQP_URL"]
    worker = WorkerProcess(folder, settings, light=True, arguments=arguments)
    async with running(worker), Peer(url) as peer, EventRecorder(url) as recorder:
        yield Scenario(worker, peer, recorder, folder / "go")


@EITHER_SIGNAL
async def test_running_jobs_are_finished_and_what_waits_stays_in_the_queue(
    service_environment: dict[str, str], tmp_path: Path, number: int
) -> None:
    async with scenario(service_environment, tmp_path) as here:
        await here.fill()
        here.send(number)
        await eventually(lambda: here.worker.log_lines(event="draining"))
        here.go.touch()
        await here.leave()
        await here.audit(done=RUNNING)


async def test_what_is_not_finished_in_the_time_of_grace_is_handed_back(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path, arguments=["--grace", "1"]) as here:
        await here.fill()
        here.send(signal.SIGTERM)
        await here.leave(AT_ONCE_S)
        await here.audit(done=0)


@EITHER_SIGNAL
async def test_a_second_signal_hands_everything_back_at_once(
    service_environment: dict[str, str], tmp_path: Path, number: int
) -> None:
    async with scenario(service_environment, tmp_path) as here:
        await here.fill()
        here.send(number)
        await eventually(lambda: here.worker.log_lines(event="draining"))
        here.send(number)
        await here.leave(AT_ONCE_S)
        assert here.worker.log_lines(event="stopping at once", requeued=RUNNING)
        await here.audit(done=0)


async def test_while_storage_is_away_the_time_of_grace_bounds_the_wait_for_it(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with Proxy.for_url(service_environment["ACESTEP_S3_ENDPOINT"]) as s3:
        through = {"ACESTEP_S3_ENDPOINT": s3.url(service_environment["ACESTEP_S3_ENDPOINT"])}
        async with scenario(service_environment, tmp_path, arguments=["--grace", "2"], **through) as here:
            await here.fill()
            s3.refuse()
            here.go.touch()
            await eventually(lambda: "storage is unavailable" in here.worker.log.read_text(), WITHIN_S)
            here.send(signal.SIGTERM)
            await here.leave()
            await here.audit(done=0)


async def test_storage_that_comes_back_in_the_time_of_grace_gets_the_songs(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with Proxy.for_url(service_environment["ACESTEP_S3_ENDPOINT"]) as s3:
        through = {"ACESTEP_S3_ENDPOINT": s3.url(service_environment["ACESTEP_S3_ENDPOINT"])}
        async with scenario(service_environment, tmp_path, **through) as here:
            await here.fill()
            s3.refuse()
            here.go.touch()
            await eventually(lambda: "storage is unavailable" in here.worker.log.read_text(), WITHIN_S)
            here.send(signal.SIGTERM)
            await eventually(lambda: here.worker.log_lines(event="draining"))
            s3.heal()
            await here.leave()
            await here.audit(done=RUNNING)


async def test_while_the_broker_is_away_the_time_of_grace_bounds_the_wait_for_it(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    """The broker has the messages back already: their connection is gone."""
    url = service_environment["ACESTEP_AMQP_URL"]
    async with Proxy.for_url(url) as amqp:
        through = {"ACESTEP_AMQP_URL": amqp.url(url)}
        async with scenario(service_environment, tmp_path, arguments=["--grace", "1"], **through) as here:
            await here.fill()
            amqp.refuse()
            await eventually(lambda: "broker not reachable" in here.worker.log.read_text(), WITHIN_S)
            here.send(signal.SIGTERM)
            await here.leave(AT_ONCE_S)
            await here.audit(done=0)


async def test_what_ended_while_the_broker_was_away_is_told_by_the_next_worker_and_not_made_again(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    url = service_environment["ACESTEP_AMQP_URL"]
    async with Proxy.for_url(url) as amqp:
        through = {"ACESTEP_AMQP_URL": amqp.url(url)}
        async with scenario(service_environment, tmp_path, arguments=["--grace", "5"], **through) as here:
            await here.fill()
            amqp.refuse()
            await eventually(lambda: "broker not reachable" in here.worker.log.read_text(), WITHIN_S)
            here.go.touch()
            here.send(signal.SIGTERM)
            await here.leave()
            await here.audit(done=0)
            (tmp_path / "next").mkdir()
            async with running(WorkerProcess(tmp_path / "next", service_environment, light=True)):
                await here.audit(done=here.submitted)
            makers = [event.data["worker_id"] for event in here.recorder.events if event.terminal]
            assert len(set(makers)) == 2, "the first worker's songs are told as they are"


@pytest.mark.parametrize("away", ["broker", "storage"])
async def test_a_worker_that_waits_for_its_servers_at_the_start_leaves_when_told_to(
    service_environment: dict[str, str], tmp_path: Path, away: str
) -> None:
    name = {"broker": "ACESTEP_AMQP_URL", "storage": "ACESTEP_S3_ENDPOINT"}[away]
    async with Proxy.for_url(service_environment[name]) as proxy:
        proxy.stall()
        through = service_environment | {name: proxy.url(service_environment[name])}
        async with running(WorkerProcess(tmp_path, through, light=True, await_ready=False)) as worker:
            await eventually(lambda: proxy.accepted, WITHIN_S)
            os.kill(worker.process.id.pid, signal.SIGTERM)
            began = time.monotonic()
            await eventually(lambda: not worker.process.running(), WITHIN_S)
            assert worker.process.returncode() == 0
            assert time.monotonic() - began < AT_ONCE_S


async def test_a_worker_whose_models_load_leaves_when_told_to_and_has_taken_nothing(
    service_environment: dict[str, str], tiny_checkpoints: Path, tmp_path: Path
) -> None:
    settings = service_environment | {"ACESTEP_CHECKPOINT_DIR": str(tiny_checkpoints), "ACESTEP_INIT_LLM": "false"}
    async with running(WorkerProcess(tmp_path, settings, await_ready=False)) as worker:
        await eventually(lambda: worker.log_lines(event="broker and storage ready"), WITHIN_S)
        async with Peer(service_environment["ACESTEP_AMQP_URL"]) as peer:
            await peer.submit(task_id="song")
            os.kill(worker.process.id.pid, signal.SIGTERM)
            await eventually(lambda: not worker.process.running(), WITHIN_S)
            assert worker.process.returncode() == 0
            assert not worker.log_lines(event="ready")
            assert not (await peer.take(GENERATE)).redelivered
    await asyncio.to_thread(assert_nothing_is_left, tmp_path)


async def test_a_worker_whose_broker_falls_silent_while_its_models_load_leaves_at_once(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    url = service_environment["ACESTEP_AMQP_URL"]
    async with Proxy.for_url(url) as proxy:
        settings = service_environment | {"ACESTEP_AMQP_URL": proxy.url(url), "LIGHT_LOADS_FOR_EVER": "1"}
        async with running(WorkerProcess(tmp_path, settings, light=True, await_ready=False)) as worker:
            await eventually(lambda: worker.log_lines(event="broker and storage ready"), WITHIN_S)
            proxy.stall()
            os.kill(worker.process.id.pid, signal.SIGTERM)
            began = time.monotonic()
            await eventually(lambda: not worker.process.running(), WITHIN_S)
            assert worker.process.returncode() == 0
            assert time.monotonic() - began < SILENT_CLOSE_S


def assert_nothing_is_left(scratch: Path) -> None:
    assert list(scratch.glob("acestep-*")) == []
