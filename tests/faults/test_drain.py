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
from acestep_consumer.execution.retries import EXCUSE_S
from tests.support.broker import Peer, until
from tests.support.event_recorder import EventRecorder
from tests.support.proxy import Proxy
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

BROKER, STORAGE = "ACESTEP_AMQP_URL", "ACESTEP_S3_ENDPOINT"
RUNNING, WAITING = 2, 2
# Generous for a machine with other things to do, and far from the 600 seconds that running jobs have by default.
AT_ONCE_S = 40.0
# Two seconds and a process's end. Waits for a silent broker that follow each other take longer.
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


@asynccontextmanager
async def scenario_behind(
    name: str, environment: dict[str, str], folder: Path, *, grace_s: int = 600, **variables: str
) -> AsyncIterator[tuple[Scenario, Proxy]]:
    """A worker that reaches a server through a proxy; ``name`` is the setting that has the server's address."""
    async with Proxy.for_url(environment[name]) as proxy:
        variables[name] = proxy.url(environment[name])
        async with scenario(environment, folder, arguments=["--grace", str(grace_s)], **variables) as here:
            yield here, proxy


@asynccontextmanager
async def next_worker(environment: dict[str, str], folder: Path) -> AsyncIterator[WorkerProcess]:
    """The worker that takes what another one left."""
    (folder / "next").mkdir()
    async with running(WorkerProcess(folder / "next", environment, light=True)) as worker:
        yield worker


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
    async with scenario_behind(STORAGE, service_environment, tmp_path, grace_s=2) as (here, s3):
        await here.fill()
        s3.refuse()
        here.go.touch()
        await eventually(lambda: "storage is unavailable" in here.worker.log.read_text(), WITHIN_S)
        here.send(signal.SIGTERM)
        await here.leave()
        await here.audit(done=0)


@pytest.mark.parametrize(("jobs", "within_s"), [(0, SILENT_CLOSE_S), (RUNNING, EXCUSE_S + SILENT_CLOSE_S)])
async def test_storage_that_hangs_delays_a_workers_end_only_by_the_time_of_records_of_its_attempts(
    service_environment: dict[str, str], tmp_path: Path, jobs: int, within_s: float
) -> None:
    async with scenario_behind(STORAGE, service_environment, tmp_path, grace_s=0) as (here, s3):
        if jobs:
            await here.fill()
        s3.stall()
        here.go.touch()
        await eventually(lambda: s3.held, WITHIN_S)  # a job's song, or a look whether storage is there
        began = time.monotonic()
        here.send(signal.SIGTERM)
        await here.leave()
        assert time.monotonic() - began < within_s
        await here.audit(done=0)
        async with next_worker(service_environment, tmp_path):
            await here.audit(done=here.submitted)


async def test_jobs_that_were_cancelled_while_storage_hangs_go_back_and_the_next_worker_ends_them(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario_behind(STORAGE, service_environment, tmp_path, grace_s=0) as (here, s3):
        await here.fill()
        s3.stall()
        for number in range(RUNNING):
            await here.peer.cancel(f"song-{number}")
        await eventually(lambda: s3.held, WITHIN_S)
        began = time.monotonic()
        here.send(signal.SIGTERM)
        await here.leave()
        assert time.monotonic() - began < EXCUSE_S + SILENT_CLOSE_S
        await here.audit(done=0)
        here.go.touch()
        async with next_worker(service_environment, tmp_path):
            await eventually(lambda: len(here.ended()) == here.submitted, WITHIN_S)
        states = {event.task_id: event.state for event in here.recorder.events if event.terminal}
        assert [states[f"song-{number}"] for number in range(here.submitted)] == [
            *["cancelled"] * RUNNING,
            *["completed"] * WAITING,
        ]


async def test_storage_that_comes_back_in_the_time_of_grace_gets_the_songs(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario_behind(STORAGE, service_environment, tmp_path) as (here, s3):
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
    async with scenario_behind(BROKER, service_environment, tmp_path, grace_s=1) as (here, amqp):
        await here.fill()
        amqp.refuse()
        await eventually(lambda: "broker not reachable" in here.worker.log.read_text(), WITHIN_S)
        here.send(signal.SIGTERM)
        await here.leave(AT_ONCE_S)
        await here.audit(done=0)


async def test_what_ended_while_the_broker_was_away_is_told_by_the_next_worker_and_not_made_again(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario_behind(BROKER, service_environment, tmp_path, grace_s=5) as (here, amqp):
        await here.fill()
        amqp.refuse()
        await eventually(lambda: "broker not reachable" in here.worker.log.read_text(), WITHIN_S)
        here.go.touch()
        here.send(signal.SIGTERM)
        await here.leave()
        await here.audit(done=0)
        async with next_worker(service_environment, tmp_path):
            await here.audit(done=here.submitted)
        makers = [event.data["worker_id"] for event in here.recorder.events if event.terminal]
        assert len(set(makers)) == 2, "the first worker's songs are told as they are"


@pytest.mark.parametrize("away", ["broker", "storage"])
async def test_a_worker_that_waits_for_its_servers_at_the_start_leaves_when_told_to(
    service_environment: dict[str, str], tmp_path: Path, away: str
) -> None:
    name = {"broker": BROKER, "storage": STORAGE}[away]
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


@asynccontextmanager
async def behind_a_silent_broker(
    environment: dict[str, str], folder: Path, *, grace_s: int = 600, fill: bool = False, **variables: str
) -> AsyncIterator[tuple[Scenario, Proxy]]:
    """A ready worker whose broker keeps its connections and answers nothing any more."""
    async with scenario_behind(BROKER, environment, folder, grace_s=grace_s, **variables) as (here, amqp):
        if fill:
            await here.fill()
        amqp.stall()
        yield here, amqp


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("by_tier", [False, True], ids=["", "tier-queues"])
async def test_an_idle_worker_leaves_a_silent_broker_at_once_and_says_which_events_were_not_sent(
    service_environment: dict[str, str], tmp_path: Path, signals: int, *, by_tier: bool
) -> None:
    async with behind_a_silent_broker(service_environment, tmp_path, ACESTEP_ROUTE_BY_TIER=str(by_tier).lower()) as (
        here,
        _,
    ):
        began = time.monotonic()
        here.send(signal.SIGTERM)
        if signals > 1:
            await eventually(lambda: here.worker.log_lines(event="draining"))
            here.send(signal.SIGTERM)
        await here.leave()
        assert time.monotonic() - began < SILENT_CLOSE_S
        for state in ("draining", "stopped"):
            (line,) = here.worker.log_lines(event="worker event dropped", state=state)
            assert "did not answer" in line["reason"]


async def test_a_silent_broker_delays_a_workers_end_no_longer_than_its_jobs_may_take(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with behind_a_silent_broker(service_environment, tmp_path, grace_s=4, fill=True) as (here, amqp):
        began = time.monotonic()
        here.send(signal.SIGTERM)
        await here.leave()
        assert 4 <= time.monotonic() - began < 4 + SILENT_CLOSE_S
        amqp.heal()
        await here.audit(done=0)


def assert_nothing_is_left(scratch: Path) -> None:
    assert list(scratch.glob("acestep-*")) == []
