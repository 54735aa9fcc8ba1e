# SPDX-License-Identifier: Apache-2.0
"""Consuming from a real broker: prefetch, settling, drain, and every way to lose the channel under work."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from pamqp.header import ContentHeader

from acestep_consumer.broker import consumer as consumer_module
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.delivery import AlreadySettledError, AmqpDelivery
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE
from acestep_consumer.domain.errors import MalformedBody, Verdict
from tests.support.broker import Peer, broker_settings, failed_event, until
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from infra.local.rabbitmq import RabbitMQ


class HeldDeliveries:
    """A handler that keeps deliveries unacknowledged until the test lets go of them."""

    def __init__(self) -> None:
        self.taken: list[AmqpDelivery] = []
        self.go = asyncio.Event()

    async def hold(self, delivery: AmqpDelivery) -> None:
        self.taken.append(delivery)
        await self.go.wait()
        await delivery.settle(Verdict.ACK)

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self.taken]


@asynccontextmanager
async def worker(
    url: str, handle: Callable[[AmqpDelivery], Awaitable[None]], **values: Any
) -> AsyncIterator[tuple[Consumer, BrokerConnection]]:
    settings = broker_settings(url, **values)
    async with BrokerConnection(settings, "consume") as connection, BrokerConnection(settings, "publish") as out:
        consumer = Consumer(connection, settings, handle, Publisher(out, "w1"))
        await consumer.start()
        yield consumer, connection
        await consumer.drain(0)


async def is_empty(peer: Peer, queue: str = GENERATE) -> bool:
    return await peer.ready(queue) == 0


async def test_no_more_are_unacknowledged_than_there_are_workers(amqp_url: str) -> None:
    held = HeldDeliveries()
    async with Peer(amqp_url) as peer, worker(amqp_url, held.hold, queue_workers=3) as (consumer, _):
        for number in range(7):
            await peer.request(b"%d" % number)
        await eventually(lambda: consumer.in_hand == 3)
        assert await peer.ready(GENERATE) == 4
        held.go.set()
        await eventually(lambda: len(held.taken) == 7 and consumer.in_hand == 0)
        assert held.bodies == [b"%d" % number for number in range(7)]


@pytest.mark.broker_versions
@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_a_message_that_goes_back_comes_again_and_says_so(amqp_url: str, queue_type: str) -> None:
    again: list[bool] = []

    async def handle(delivery: AmqpDelivery) -> None:
        again.append(delivery.redelivered)
        await delivery.settle(Verdict.REQUEUE if len(again) < 3 else Verdict.ACK)

    async with Peer(amqp_url) as peer, worker(amqp_url, handle, queue_type=queue_type) as (consumer, _):
        await peer.request(b"{}")
        await eventually(lambda: len(again) == 3 and not consumer.in_hand)
        assert await is_empty(peer)
    assert again == [False, True, True]


async def test_a_delivery_tells_its_properties(amqp_url: str) -> None:
    held = HeldDeliveries()
    async with Peer(amqp_url) as peer, worker(amqp_url, held.hold, queue_workers=2):
        sent = datetime.now(UTC).timestamp() - 90
        await peer.request(
            b"{}", message_id="m1", reply_to="r1", correlation_id="c1", timestamp=sent, headers={"traceparent": "00-ab"}
        )
        await peer.request(b"{}", timestamp=sent + 600)
        await eventually(lambda: len(held.taken) == 2)
        full, ahead = held.taken
        assert (full.message_id, full.reply.reply_to, full.reply.correlation_id) == ("m1", "r1", "c1")
        assert full.headers["traceparent"] == "00-ab"
        assert full.queued_s == pytest.approx(90, abs=5)
        assert ahead.queued_s == 0
        held.go.set()


async def test_a_delivery_is_settled_once(amqp_url: str) -> None:
    outcome: list[BaseException] = []

    async def handle(delivery: AmqpDelivery) -> None:
        await delivery.settle(Verdict.ACK)
        with pytest.raises(AlreadySettledError) as late:
            await delivery.settle(Verdict.REQUEUE)
        outcome.append(late.value)

    async with Peer(amqp_url) as peer, worker(amqp_url, handle) as (consumer, connection):
        channel = await connection.channel()
        await peer.request(b"{}")
        await peer.request(b"{}")
        await eventually(lambda: len(outcome) == 2 and not consumer.in_hand)
        assert await is_empty(peer)
        assert await connection.channel() is channel


@pytest.mark.broker_versions
async def test_a_dead_letter_keeps_bytes_and_headers_and_tells_why(amqp_url: str) -> None:
    async def handle(delivery: AmqpDelivery) -> None:
        await delivery.settle(Verdict.DEAD_LETTER, MalformedBody("x" * 2_000))

    body = b"\xff\x00 not json"
    async with Peer(amqp_url) as peer, worker(amqp_url, handle):
        await peer.request(
            body,
            headers={"traceparent": "00-ab", "deep": {"list": [1, True, None, 2.5]}, "double": 0.1},
            message_id="m1",
            correlation_id="c1",
            reply_to="r1",
            content_type="text/odd",
            priority=7,
            expiration=3600,
            type="t",
            app_id="a",
            user_id="guest",
        )
        kept = await peer.take(DEAD_LETTER)
        assert await is_empty(peer)
    assert kept.body == body
    assert (kept.message_id, kept.correlation_id, kept.reply_to, kept.type, kept.app_id) == ("m1", "c1", "r1", "t", "a")
    assert (kept.content_type, kept.priority) == ("text/odd", 7)
    assert kept.headers["traceparent"] == "00-ab"
    assert kept.headers["deep"] == {"list": [1, True, None, 2.5]}
    assert kept.headers["double"] == pytest.approx(0.1)
    assert kept.headers["x-acestep-code"] == "malformed_body"
    assert kept.headers["x-acestep-worker"] == "w1"
    reason = kept.headers["x-acestep-reason"]
    assert isinstance(reason, str)
    assert reason.startswith("the body is not a JSON object")
    assert len(reason) == 1_000
    # It stays until somebody looks at it: on disk, and without an end.
    assert (kept.delivery_mode, kept.expiration) == (2, None)
    assert (kept.headers["x-acestep-expiration"], kept.headers["x-acestep-user-id"]) == ("3600000", "guest")


async def test_a_handler_that_fails_or_forgets_to_settle_gives_its_message_back(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "RETURN_DELAY_S", 0.05)
    runs: Counter[bytes] = Counter()

    async def handle(delivery: AmqpDelivery) -> None:
        runs[delivery.body] += 1
        if runs[delivery.body] > 1:
            await delivery.settle(Verdict.ACK)
        elif delivery.body == b"fails":
            raise ZeroDivisionError

    async with Peer(amqp_url) as peer, worker(amqp_url, handle) as (consumer, _):
        await peer.request(b"fails")
        await peer.request(b"forgets")
        await eventually(lambda: runs == {b"fails": 2, b"forgets": 2} and not consumer.in_hand)
        assert await is_empty(peer)


async def test_a_drain_lets_work_end_and_takes_nothing_new(amqp_url: str) -> None:
    held = HeldDeliveries()
    async with Peer(amqp_url) as peer, worker(amqp_url, held.hold, queue_workers=2) as (consumer, _):
        for number in range(4):
            await peer.request(b"%d" % number)
        await eventually(lambda: consumer.in_hand == 2)
        draining = asyncio.create_task(consumer.drain(grace_s=20))
        await asyncio.sleep(0.2)
        assert not draining.done()
        held.go.set()
        await draining
        assert held.bodies == [b"0", b"1"]
        assert await peer.ready(GENERATE) == 2


async def test_what_a_drain_cannot_wait_for_goes_back(amqp_url: str) -> None:
    held = HeldDeliveries()
    async with Peer(amqp_url) as peer, worker(amqp_url, held.hold, queue_workers=2) as (consumer, _):
        for number in range(3):
            await peer.request(b"%d" % number)
        await eventually(lambda: consumer.in_hand == 2)
        await consumer.drain(grace_s=0.1)
        assert consumer.in_hand == 0

        async def all_back() -> bool:
            return await peer.ready(GENERATE) == 3

        await until(all_back, "all three messages ready again")


async def test_a_drained_consumer_stays_away_after_a_reconnect(amqp_url: str) -> None:
    held = HeldDeliveries()
    async with Peer(amqp_url) as peer, worker(amqp_url, held.hold) as (consumer, connection):
        await consumer.drain(grace_s=0)
        connection.reconnect("a test")
        await connection.channel()
        await peer.request(b"{}")
        await asyncio.sleep(0.2)
        assert (held.taken, await peer.ready(GENERATE)) == ([], 1)


async def test_a_stale_delivery_is_never_acked_on_the_new_channel(amqp_url: str) -> None:
    held = HeldDeliveries()
    async with Peer(amqp_url) as peer, worker(amqp_url, held.hold) as (consumer, connection):
        await peer.request(b"{}")
        await eventually(lambda: len(held.taken) == 1)
        connection.reconnect("a test")
        await eventually(lambda: len(held.taken) == 2)  # the first still runs; both have delivery tag 1
        old, new = held.taken
        assert (old.stale, new.stale, new.redelivered) == (True, False, True)
        await old.settle(Verdict.ACK)
        assert old.settled
        await consumer.drain(0)  # gives the new one back, which it could not were it acked

        async def back() -> bool:
            return await peer.ready(GENERATE) == 1

        await until(back, "the message is ready again")
        assert await is_empty(peer, DEAD_LETTER)


async def test_a_stale_delivery_is_not_dead_lettered_either(amqp_url: str) -> None:
    held = HeldDeliveries()
    async with Peer(amqp_url) as peer, worker(amqp_url, held.hold) as (_, connection):
        await peer.request(b"{}")
        await eventually(lambda: len(held.taken) == 1)
        connection.reconnect("a test")
        await eventually(lambda: len(held.taken) == 2)
        await held.taken[0].settle(Verdict.DEAD_LETTER, MalformedBody("no"))
        assert await is_empty(peer, DEAD_LETTER)


@pytest.mark.broker_versions
async def test_a_queue_deleted_under_the_consumer_is_made_again_and_consumed(amqp_url: str) -> None:
    held = HeldDeliveries()
    held.go.set()
    async with Peer(amqp_url) as peer, worker(amqp_url, held.hold) as (_, connection):
        old = await connection.channel()
        await peer.channel.queue_delete(GENERATE)
        await eventually(lambda: old.is_closed and connection.is_up)
        await peer.request(b"{}")
        await eventually(lambda: held.bodies == [b"{}"])


def properties(flag: int, value: bytes) -> bytes:
    return struct.pack(">H", flag) + value


def nested(depth: int) -> bytes:
    """Headers in headers in headers: pamqp reads more of them than it can write."""
    table = struct.pack(">I", 0)
    for _ in range(depth):
        table = struct.pack(">I", len(table) + 3) + b"\x01kF" + table
    return table


ODD_PROPERTIES = {
    "a message_id in Latin-1": properties(1 << 7, b"\x04caf\xe9"),
    "a timestamp in microseconds": properties(1 << 6, struct.pack(">Q", 1_700_000_000_000_000)),
    "a timestamp with the highest bit": properties(1 << 6, struct.pack(">Q", 1 << 63)),
    "a header name that is not text": properties(1 << 13, struct.pack(">I", 9) + b"\x02\xff\xfeS\x00\x00\x00\x01a"),
    "a header value that is not text": properties(1 << 13, struct.pack(">I", 9) + b"\x01kS\x00\x00\x00\x02\xff\xfe"),
    "headers 470 deep": properties(1 << 13, nested(470)),
    "a double beyond single precision": properties(
        1 << 13, struct.pack(">I", 11) + b"\x01kd" + struct.pack(">d", 1e300)
    ),
}


@pytest.mark.parametrize("odd", ODD_PROPERTIES.values(), ids=ODD_PROPERTIES.keys())
async def test_odd_properties_neither_end_the_connection_nor_block_the_queue(
    amqp_url: str, odd: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handle(delivery: AmqpDelivery) -> None:
        await delivery.settle(Verdict.DEAD_LETTER, MalformedBody("odd"))

    async with Peer(amqp_url) as peer, worker(amqp_url, handle) as (_, connection):
        channel = await connection.channel()
        with monkeypatch.context() as raw:
            raw.setattr(ContentHeader, "marshal", lambda header: struct.pack(">HHQ", 60, 0, header.body_size) + odd)
            await peer.request(b"odd")
        await peer.request(b"good")
        assert [(await peer.take(DEAD_LETTER)).body for _ in range(2)] == [b"odd", b"good"]
        assert await connection.channel() is channel


class Job:
    """A handler that publishes a terminal event and acks; a message seen before costs no second run."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.acked: Counter[str] = Counter()

    async def run(self, delivery: AmqpDelivery) -> None:
        task_id = delivery.message_id
        assert task_id is not None
        await asyncio.sleep(0.005)
        await self._publisher.publish(failed_event(task_id), delivery.reply)
        await delivery.settle(Verdict.ACK)
        self.acked[task_id] += 1


async def run_under_faults(url: str, peer_url: str, jobs: int, fault: Callable[[Job], Awaitable[None]]) -> set[str]:
    """Run ``jobs`` messages to their end while ``fault`` strikes; return the task ids whose event was heard."""
    settings = broker_settings(url, queue_workers=8, queue_maxsize=1_000)
    async with BrokerConnection(settings, "consume") as connection, BrokerConnection(settings, "publish") as out:
        job = Job(Publisher(out, "w1"))
        consumer = Consumer(connection, settings, job.run, Publisher(out, "w1"))
        async with Peer(peer_url) as peer:
            events = await peer.channel.declare_queue("heard", durable=True)
            await events.bind("acestep.events", "job.failed.#")
            for number in range(jobs):
                await peer.request(b"{}", message_id=f"t{number}", delivery_mode=2)
        await consumer.start()
        await fault(job)
        await eventually(lambda: len(job.acked) == jobs and consumer.in_hand == 0)
        await consumer.drain(0)
    async with Peer(peer_url) as peer:
        assert await is_empty(peer)
        count = await peer.ready("heard")
        return {(await peer.take("heard")).routing_key.removeprefix("job.failed.") for _ in range(count)}  # type: ignore[union-attr]  # it was routed


async def test_nothing_is_lost_when_connections_are_cut_and_closed_under_load(
    amqp_url: str, amqp_vhost: str, rabbitmq: RabbitMQ
) -> None:
    async with Proxy.for_url(amqp_url) as proxy:

        async def fault(job: Job) -> None:
            for wanted in (50, 100, 150):
                await eventually(lambda wanted=wanted: len(job.acked) >= wanted)  # type: ignore[misc]
                proxy.cut()
            await asyncio.to_thread(rabbitmq.ctl, "close_all_connections", "--vhost", amqp_vhost, "an operator")

        heard = await run_under_faults(proxy.url(amqp_url), amqp_url, 1_000, fault)
    assert heard == {f"t{number}" for number in range(1_000)}


async def test_nothing_is_lost_when_the_broker_restarts_under_load(own_rabbitmq: RabbitMQ) -> None:
    async def fault(job: Job) -> None:
        await eventually(lambda: len(job.acked) >= 50)
        await asyncio.to_thread(own_rabbitmq.restart)

    heard = await run_under_faults(own_rabbitmq.amqp_url, own_rabbitmq.amqp_url, 400, fault)
    assert heard == {f"t{number}" for number in range(400)}


ALARM = ("absolute", "1MB")
NO_ALARM = ("0.4",)


@pytest.fixture
def memory_limit(rabbitmq: RabbitMQ) -> Iterator[Callable[..., str]]:
    """Set the memory limit of the session's broker; as it was after the test."""
    limit = partial(rabbitmq.ctl, "set_vm_memory_high_watermark")
    yield limit
    limit(*NO_ALARM)


async def test_a_memory_alarm_delays_events_and_holds_up_no_ack(
    amqp_url: str, memory_limit: Callable[..., str]
) -> None:
    held = HeldDeliveries()
    settings = broker_settings(amqp_url, queue_workers=1)
    async with (
        BrokerConnection(settings, "consume") as connection,
        BrokerConnection(settings, "publish") as out,
        Peer(amqp_url) as peer,
    ):
        publisher = Publisher(out, "w1")
        consumer = Consumer(connection, settings, held.hold, publisher)
        await peer.request(b"1")
        await peer.request(b"2")
        await consumer.start()
        await eventually(lambda: len(held.taken) == 1)
        await asyncio.to_thread(memory_limit, *ALARM)
        publishing = asyncio.create_task(publisher.publish(failed_event("t1"), held.taken[0].reply))
        await asyncio.sleep(0.2)
        held.go.set()
        await eventually(lambda: len(held.taken) == 2)  # the first was acked, for the second came
        assert not publishing.done()
        await asyncio.to_thread(memory_limit, *NO_ALARM)
        await publishing
        await consumer.drain(0)
