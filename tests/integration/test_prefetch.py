# SPDX-License-Identifier: Apache-2.0
"""The prefetch while it changes, on a real broker: by hand, and by ``ACESTEP_QUEUE_WORKERS=auto``."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families as parse

from acestep_consumer.app import Worker
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.delivery import AmqpDelivery
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.topology import GENERATE
from acestep_consumer.client import Client
from acestep_consumer.config.settings import load
from acestep_consumer.domain.errors import Verdict
from acestep_consumer.worker import prefetch_controller
from acestep_consumer.worker.prefetch_controller import PrefetchController
from acestep_consumer.worker.prefetch_policy import PrefetchPolicy, PrefetchTuning
from acestep_schemas.events import JobCompleted, JobStarted, WorkerEvent
from infra.local.ports import PortClaim
from tests.support.broker import API_POLL_S, Peer, broker_settings, until
from tests.support.collector import freeze_the_living
from tests.support.engine_stats import engine_stats
from tests.support.fake_engine import FakeEngines, FakeRenderer
from tests.support.waiting import WITHIN_S, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from acestep_consumer.config.settings import Settings
    from acestep_consumer.domain.job import Job
    from tests.support.servers import ManagementApi


class HeldDeliveries:
    """A handler that keeps deliveries unacknowledged until the test has one finished."""

    def __init__(self) -> None:
        self.open: list[tuple[AmqpDelivery, asyncio.Event]] = []
        self.redelivered = 0
        self.done: Counter[bytes] = Counter()
        self.most = 0

    async def hold(self, delivery: AmqpDelivery) -> None:
        entry = (delivery, asyncio.Event())
        self.open.append(entry)
        self.most = max(self.most, len(self.open))
        self.redelivered += delivery.redelivered
        await entry[1].wait()
        await delivery.settle(Verdict.ACK)
        self.open.remove(entry)
        self.done[delivery.body] += 1

    def finish(self, count: int) -> None:
        for _, go in self.open[:count]:
            go.set()


@asynccontextmanager
async def consuming(url: str, held: HeldDeliveries, **values: Any) -> AsyncIterator[tuple[Consumer, BrokerConnection]]:
    settings = broker_settings(url, **values)
    async with BrokerConnection(settings, "consume") as connection, BrokerConnection(settings, "publish") as out:
        consumer = Consumer(connection, settings, held.hold, Publisher(out, "w1"))
        await consumer.start()
        yield consumer, connection
        await consumer.drain(0)


async def ready_is(peer: Peer, count: int) -> None:
    async def so() -> bool:
        return await peer.ready(GENERATE) == count

    await until(so, f"{count} messages ready")


async def broker_lists(management: ManagementApi, vhost: str, prefetch: Callable[[], int]) -> None:
    """Wait until the queue's consumers have this prefetch together; the broker's list is a second late."""

    async def so() -> bool:
        listed = await asyncio.to_thread(management.call, "GET", f"/api/consumers/{vhost}")
        at_the_broker: list[int] = [
            consumer["prefetch_count"] for consumer in listed if consumer["queue"]["name"] == GENERATE
        ]
        return sum(at_the_broker) == prefetch()

    await until(so, f"the broker lists a prefetch of {prefetch()}", every_s=API_POLL_S)


@pytest.mark.broker_versions
@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_a_larger_prefetch_holds_at_once_and_exactly(
    amqp_url: str, amqp_vhost: str, management: ManagementApi, queue_type: str
) -> None:
    held = HeldDeliveries()
    values = {"queue_workers": 1, "queue_type": queue_type}
    async with Peer(amqp_url) as peer, consuming(amqp_url, held, **values) as (consumer, _):
        for number in range(6):
            await peer.request(b"%d" % number)
        await eventually(lambda: consumer.in_hand == 1)
        await consumer.set_prefetch(4)
        await eventually(lambda: consumer.in_hand == 4)
        await broker_lists(management, amqp_vhost, lambda: 4)
        assert await peer.ready(GENERATE) == 2
        assert held.redelivered == 0


@pytest.mark.broker_versions
@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("steps", [[2, 3, 4], [4]], ids=["grown in steps", "from one piece"])
async def test_a_smaller_prefetch_takes_nothing_back_and_brings_nothing_new_until_enough_is_settled(
    amqp_url: str, amqp_vhost: str, management: ManagementApi, steps: list[int], queue_type: str
) -> None:
    held = HeldDeliveries()
    values = {"queue_workers": steps[0], "queue_type": queue_type}
    async with Peer(amqp_url) as peer, consuming(amqp_url, held, **values) as (consumer, _):
        for step in steps[1:]:
            await consumer.set_prefetch(step)
        for number in range(10):
            await peer.request(b"%d" % number)
        await eventually(lambda: consumer.in_hand == 4)
        await consumer.set_prefetch(2)
        await ready_is(peer, 6)
        for finished in (1, 2):  # four are running, then three, then two: nothing comes yet
            held.finish(1)
            await eventually(lambda finished=finished: sum(held.done.values()) == finished)  # type: ignore[misc]
            await ready_is(peer, 6)
            assert consumer.in_hand == 4 - finished
        for finished in range(3, 11):  # from now on one comes for each that is settled
            held.finish(1)
            await eventually(lambda finished=finished: sum(held.done.values()) == finished)  # type: ignore[misc]
            await eventually(lambda finished=finished: consumer.in_hand == min(2, 10 - finished))  # type: ignore[misc]
        assert (set(held.done.values()), held.redelivered, held.most) == ({1}, 0, 4)
        await ready_is(peer, 0)
        await broker_lists(management, amqp_vhost, lambda: 2)


async def test_the_prefetch_survives_a_new_connection(
    amqp_url: str, amqp_vhost: str, management: ManagementApi
) -> None:
    held = HeldDeliveries()
    async with Peer(amqp_url) as peer, consuming(amqp_url, held, queue_workers=1) as (consumer, connection):
        for number in range(6):
            await peer.request(b"%d" % number)
        await eventually(lambda: consumer.in_hand == 1)
        await consumer.set_prefetch(3)
        await eventually(lambda: consumer.in_hand == 3)
        connection.reconnect("a test")
        # The three old ones run on, stale; three come again or anew.
        await eventually(lambda: consumer.in_hand == 6)
        await broker_lists(management, amqp_vhost, lambda: 3)
        await consumer.set_prefetch(1)
        held.finish(6)
        await eventually(lambda: len(held.open) == 1 and consumer.finished == 6)
        await ready_is(peer, 2)


async def test_a_prefetch_set_while_the_link_is_down_holds_when_it_is_back(amqp_url: str) -> None:
    held = HeldDeliveries()
    async with Peer(amqp_url) as peer, consuming(amqp_url, held, queue_workers=1) as (consumer, connection):
        channel = await connection.channel()
        connection.reconnect("a test")
        await eventually(lambda: channel.is_closed)
        await consumer.set_prefetch(2)
        for number in range(4):
            await peer.request(b"%d" % number)
        await eventually(lambda: consumer.in_hand == 2)
        await ready_is(peer, 2)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_changes_under_load_lose_nothing_and_deliver_nothing_again(amqp_url: str, queue_type: str) -> None:
    """A quorum queue counts a delivery that never was for a message that crosses the end of its consumer: rare."""
    jobs, chance = 300, random.Random(7)  # noqa: S311 - a fixed course of numbers
    again: list[bool] = []
    done: Counter[bytes] = Counter()

    async def handle(delivery: AmqpDelivery) -> None:
        again.append(delivery.redelivered)
        await asyncio.sleep(chance.uniform(0.02, 0.2))
        await delivery.settle(Verdict.ACK)
        done[delivery.body] += 1

    settings = broker_settings(amqp_url, queue_workers=4, queue_type=queue_type, queue_maxsize=1_000)
    async with (
        BrokerConnection(settings, "consume") as connection,
        BrokerConnection(settings, "publish") as out,
        Peer(amqp_url) as peer,
    ):
        for number in range(jobs):
            await peer.request(b"%d" % number, delivery_mode=2)
        consumer = Consumer(connection, settings, handle, Publisher(out, "w1"))
        channel = await connection.channel()
        await consumer.start()
        while len(done) < jobs:
            before, count = consumer.prefetch, chance.randint(1, 8)
            most = max(before, count, consumer.in_hand)
            await consumer.set_prefetch(count)
            assert consumer.in_hand <= most
            await asyncio.sleep(chance.uniform(0, 0.1))
        await eventually(lambda: not consumer.in_hand)
        assert await connection.channel() is channel
        await ready_is(peer, 0)
        await consumer.drain(0)
    assert (len(again), set(done.values())) == (jobs, {1})
    assert sum(again) <= (3 if queue_type == "quorum" else 0)


async def test_a_change_that_is_cancelled_keeps_channel_and_work(amqp_url: str) -> None:
    """A stop comes whenever it likes, also while the prefetch changes."""
    held = HeldDeliveries()
    async with Peer(amqp_url) as peer, consuming(amqp_url, held, queue_workers=1) as (consumer, connection):
        channel = await connection.channel()
        await peer.request(b"1")
        await eventually(lambda: consumer.in_hand == 1)
        changing = asyncio.create_task(consumer.set_prefetch(5))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        changing.cancel()
        draining = asyncio.create_task(consumer.drain(20))
        held.finish(1)
        await draining
        assert not channel.is_closed
        assert await connection.channel() is channel
        assert held.done == {b"1": 1}
        await ready_is(peer, 0)


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_stays_frozen() -> Iterator[None]:
    """Workers in this process freeze the tests, too."""
    yield
    freeze_the_living()


@pytest.fixture
def auto_environment(service_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Settings of a worker in this process, whose policy is in fast motion."""
    for name, value in service_environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    habits = PrefetchTuning(measure_s=0.4, jobs_each=4, least_jobs=8, rest_s=1, memory_s=60)
    monkeypatch.setattr("acestep_consumer.worker.intake.PrefetchPolicy", partial(PrefetchPolicy, habits=habits))
    claim = PortClaim(1)
    yield service_environment | {
        "ACESTEP_QUEUE_WORKERS": "auto",
        "ACESTEP_QUEUE_WORKERS_MAX": "12",
        "ACESTEP_QUEUE_MAXSIZE": "1000",
        "ACESTEP_HTTP_PORT": str(claim.ports[0]),
    }
    claim.release()


@asynccontextmanager
async def working(settings: Settings, engines: FakeEngines, card: SharedCard) -> AsyncIterator[Worker]:
    """A worker without its process; told to stop in the end, and waited for."""
    worker = Worker(settings, engines, 20)
    async with asyncio.TaskGroup() as tasks:
        rendering = tasks.create_task(
            card.work(lambda: consumer.prefetch if (consumer := worker._state.consumer) else 1)
        )
        running = tasks.create_task(worker.run())
        yield worker
        worker._signals.shut_down()
        await running
        rendering.cancel()


async def scraped(settings: Settings) -> dict[str, float]:
    """The samples of the worker's page of metrics, by name."""
    url = f"http://127.0.0.1:{settings.worker.http_port}/metrics"
    async with ClientSession() as client, client.get(url) as answer:
        return {sample.name: sample.value for family in parse(await answer.text()) for sample in family.samples}


async def fill_queue(peer: Peer, jobs: int) -> None:
    for number in range(jobs):
        body = {"task_id": f"t{number}", "prompt": "x", "audio_duration": 10}
        await peer.request(json.dumps(body).encode(), delivery_mode=2)


class SharedCard:
    """Renders the running jobs in packs of at most eight. A pack takes ``LAUNCH_S``, however many songs it has.

    That is time of its own clock, which is the policy's, too, and the policy looks at the worker before each launch:
    what it measures does not depend on how busy this machine is. A pack is launched as soon as it is full, or nothing
    more comes for a while.
    """

    LAUNCH_S, PACK = 0.25, 8
    PATIENCE_S = 5.0

    def __init__(self) -> None:
        self._waiting: list[asyncio.Event] = []
        self._launches = 0
        self._to_be_seen, self._seen = asyncio.Event(), asyncio.Event()

    def monotonic(self) -> float:
        """Seconds of its clock."""
        return self._launches * self.LAUNCH_S

    async def render(self, _job: Job) -> None:
        done = asyncio.Event()
        self._waiting.append(done)
        await done.wait()

    async def work(self, prefetch: Callable[[], int]) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.PATIENCE_S):
                    while len(self._waiting) < min(prefetch(), self.PACK):  # noqa: ASYNC110 - of two parties
                        await asyncio.sleep(0.005)
            self._to_be_seen.set()
            await self._seen.wait()
            self._seen.clear()
            self._launches += 1
            for done in self._waiting[: self.PACK]:
                done.set()
            del self._waiting[: self.PACK]

    async def show(self, controller: PrefetchController) -> None:
        """In place of the controller's own loop, which looks every few seconds."""
        while True:
            await self._to_be_seen.wait()
            self._to_be_seen.clear()
            await controller.step()
            self._seen.set()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SharedCard:
    card = SharedCard()

    async def run(controller: PrefetchController) -> None:
        await card.show(controller)

    monkeypatch.setattr(prefetch_controller, "time", card)
    monkeypatch.setattr(PrefetchController, "run", run)
    return card


async def test_auto_climbs_with_the_throughput_and_every_job_is_done_once(
    auto_environment: dict[str, str], card: SharedCard, amqp_url: str, amqp_vhost: str, management: ManagementApi
) -> None:
    """A whole worker but for the engine, whose card is best used by eight jobs at once."""
    settings, jobs = load(auto_environment, None), 300
    engines = FakeEngines(FakeRenderer(before=card.render))
    completed: Counter[str] = Counter()
    attempts: Counter[int] = Counter()
    told: list[int] = []
    async with BrokerConnection(settings.broker, "topology"), Peer(amqp_url) as peer, Client(amqp_url) as client:
        await fill_queue(peer, jobs)
        async with (
            asyncio.timeout(120),
            client.subscribe("job.started.*", "job.completed.*", "worker.*.*") as events,
            working(settings, engines, card) as worker,
        ):
            while len(completed) < jobs:
                match await anext(events):
                    case JobCompleted(subject=task_id):
                        completed[task_id] += 1
                    case JobStarted(data=started):
                        attempts[started.attempt] += 1
                    case WorkerEvent(data=news):
                        told.append(news.prefetch)
            consumer = worker._state.consumer
            assert consumer is not None
            await broker_lists(management, amqp_vhost, lambda: consumer.prefetch)
            assert (await scraped(settings))["acestep_workers"] == consumer.prefetch
        await ready_is(peer, 0)
    assert completed == Counter(f"t{number}" for number in range(jobs))
    assert attempts == {1: jobs}
    assert told[:5] == [2, 3, 4, 6, 8]
    assert 8 <= engines.renderer.most_at_once <= max(told)


async def test_auto_steps_back_when_the_renderer_tells_of_too_little_memory(
    auto_environment: dict[str, str], card: SharedCard, amqp_url: str
) -> None:
    """The renderer runs short of memory as soon as five jobs are running."""
    settings, engines, reductions = load(auto_environment, None), FakeEngines(FakeRenderer()), 0

    async def before(job: Job) -> None:
        nonlocal reductions
        reductions += engines.renderer.at_once > 4
        engines.renderer_usage.note(engine_stats(audio_s=0, reductions=reductions), time.monotonic())
        await card.render(job)

    engines.renderer.before = before
    told: list[int] = []
    async with BrokerConnection(settings.broker, "topology"), Peer(amqp_url) as peer, Client(amqp_url) as client:
        await fill_queue(peer, 300)
        async with (
            asyncio.timeout(WITHIN_S),
            client.subscribe("worker.ready.*") as events,
            working(settings, engines, card),
        ):
            while not told or max(told) <= told[-1] or max(told) < 6:
                event = await anext(events)
                assert isinstance(event, WorkerEvent)
                told.append(event.data.prefetch)
    assert told[-2:] == [6, 4]
    assert engines.renderer_usage.reductions > 0


async def test_a_delivery_that_goes_back_is_no_finished_work(amqp_url: str) -> None:
    """``auto`` measures by it: a worker that hands jobs back must not look fast."""
    settled: list[Verdict] = []

    async def handle(delivery: AmqpDelivery) -> None:
        verdict = Verdict.ACK if settled else Verdict.REQUEUE
        await delivery.settle(verdict)
        settled.append(verdict)

    settings = broker_settings(amqp_url, queue_workers=1)
    async with (
        Peer(amqp_url) as peer,
        BrokerConnection(settings, "consume") as connection,
        BrokerConnection(settings, "publish") as out,
    ):
        consumer = Consumer(connection, settings, handle, Publisher(out, "w1"))
        await consumer.start()
        for _ in range(2):
            await peer.request(b'{"prompt": "x"}')
        await eventually(lambda: len(settled) == 3 and not consumer.in_hand)
        assert consumer.finished == 2
        await consumer.drain(0)
