# SPDX-License-Identifier: Apache-2.0
"""Requests between cards of different sizes, on a real broker: sent on, served, adopted, never lost."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from acestep_consumer.broker import connection as connection_module
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.delivery import AmqpDelivery
from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.tier_queues import TierQueues
from acestep_consumer.broker.topology import CONTROL, GENERATE, TIER, tier_queue
from acestep_consumer.domain.errors import Unpublished, Verdict
from acestep_consumer.policy.tiers import BUILT_IN
from tests.support.broker import Peer, broker_settings, until
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from infra.local.rabbitmq import RabbitMQ
    from tests.support.servers import ManagementApi

NAMES = tuple(tier.name for tier in BUILT_IN.tiers)
LARGE, LARGE_QUEUE = "unlimited", tier_queue("unlimited")


class TierWorker:
    """A worker's way in, and a handler that keeps deliveries unacknowledged until the test lets go of them."""

    def __init__(self) -> None:
        self.taken: list[AmqpDelivery] = []
        self.most = 0
        self.go = asyncio.Event()
        self.in_hand = 0
        self.calls = 0

    async def hold(self, delivery: AmqpDelivery) -> None:
        self.taken.append(delivery)
        self.in_hand += 1
        self.most = max(self.most, self.in_hand)
        await self.go.wait()
        self.in_hand -= 1
        await delivery.settle(Verdict.ACK)

    async def finish(self, count: int) -> None:
        """Acknowledge what is held, and keep what comes after it."""
        before, self.go = self.go, asyncio.Event()
        assert self.in_hand == count
        before.set()
        await eventually(lambda: all(delivery.settled for delivery in self.taken[:count]))

    def of(self, tier: str | None) -> list[bytes]:
        return [delivery.body for delivery in self.taken if delivery.tier == tier]


@asynccontextmanager
async def worker(url: str, card: TierWorker, own: str, **values: Any) -> AsyncIterator[tuple[Consumer, TierQueues]]:
    unattended_s, control_url = values.pop("unattended_s", 60.0), values.pop("control_url", url)
    settings = broker_settings(url, **values)
    async with (
        BrokerConnection(settings, "consume") as connection,
        BrokerConnection(settings, "publish") as out,
        BrokerConnection(broker_settings(control_url, **values), "control") as control,
    ):
        publisher = Publisher(out, own)

        async def call(tier: str) -> bool:
            card.calls += 1
            return await publisher.notify_tier(tier)

        consumer = Consumer(connection, settings, card.hold, publisher)
        tiers = TierQueues(control, consumer, own=own, tiers=NAMES, notify_tier=call, unattended_s=unattended_s)
        await consumer.start()
        await tiers.start()
        yield consumer, tiers
        await tiers.stop()
        await consumer.drain(0)


async def sent_on(card: TierWorker, tier: str = LARGE) -> list[bool]:
    """Have a card send on all that it holds, and ack what arrived."""
    answers = [await delivery.forward(tier) for delivery in card.taken]
    for delivery, arrived in zip(card.taken, answers, strict=True):
        if arrived:
            await delivery.settle(Verdict.ACK)
    return answers


@asynccontextmanager
async def small_and_large(url: str, **values: Any) -> AsyncIterator[tuple[Peer, TierWorker, TierWorker]]:
    small, large = TierWorker(), TierWorker()
    async with AsyncExitStack() as stack:
        peer = await stack.enter_async_context(Peer(url))
        await stack.enter_async_context(worker(url, small, "tier1", queue_workers=2, **values))
        for number in range(2):
            await peer.request(b"big %d" % number, message_id="twice the same")
        await eventually(lambda: small.in_hand == 2)
        await stack.enter_async_context(worker(url, large, LARGE, queue_workers=2, **values))
        yield peer, small, large
        small.go.set()
        large.go.set()


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_what_is_sent_on_is_taken_by_the_larger_card_and_counts_as_its_own(
    amqp_url: str, queue_type: str
) -> None:
    async with small_and_large(amqp_url, queue_type=queue_type) as (peer, small, large):
        assert await sent_on(small) == [True, True]
        await eventually(lambda: large.of(LARGE) == [b"big 0", b"big 1"])
        for number in range(3):
            await peer.request(b"small %d" % number)
        await peer.ready(GENERATE)
        assert large.most == 2
        assert [(each.fingerprint, each.message_id) for each in large.taken] == [
            (each.fingerprint, each.message_id) for each in small.taken[:2]
        ]


async def test_nobody_of_that_tier_means_that_nothing_is_sent_on(amqp_url: str) -> None:
    async with small_and_large(amqp_url) as (peer, small, _):
        assert await small.taken[0].forward("tier6") is False
        assert await peer.ready(tier_queue("tier6")) == 0


async def test_a_full_queue_means_that_nothing_is_sent_on(amqp_url: str) -> None:
    async with small_and_large(amqp_url, queue_maxsize=1) as (peer, small, large):
        for taken in (1, 2):
            await big(peer, b"waiting")
            await eventually(lambda taken=taken: large.in_hand == taken)  # type: ignore[misc]
        await big(peer, b"waiting")
        assert await small.taken[0].forward(LARGE) is False
        assert await peer.ready(LARGE_QUEUE) == 1


async def test_to_find_nobody_or_a_full_queue_is_no_fault_and_costs_no_connection(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "RECONNECT_INTERVAL_S", 0.0)
    faults: list[Exception] = []
    async with (
        Peer(amqp_url) as peer,
        BrokerConnection(broker_settings(amqp_url, queue_maxsize=1), "publish") as connection,
    ):
        await connection.declare_tier_queue(LARGE)
        publisher, properties = Publisher(connection, "w1", faults.append), aio_pika.Message(b"").properties
        assert await publisher.forward(b"big", properties, LARGE) is False
        there = await peer.channel.declare_queue(exclusive=True)
        await there.bind(CONTROL, f"{TIER}.{LARGE}")
        before = await connection.channel()
        assert [await publisher.forward(b"big", properties, LARGE) for _ in range(2)] == [True, False]
        assert await connection.channel() is before
    assert faults == []


async def test_the_prefetch_spans_both_queues_and_work_for_this_tier_goes_first(amqp_url: str) -> None:
    card = TierWorker()
    async with Peer(amqp_url) as peer, worker(amqp_url, card, LARGE, queue_workers=3) as (consumer, _):
        await big(peer, b"big 0", b"big 1")
        await eventually(lambda: sorted(card.of(LARGE)) == [b"big 0", b"big 1"])
        for number in range(6):
            await peer.request(b"small %d" % number)
        await eventually(lambda: card.in_hand == 3)
        await until(lambda: ready_is(peer, GENERATE, 5), "one is unacknowledged and five wait")
        await card.finish(3)  # with no work of its tier left, all places are the producers' queue's
        await eventually(lambda: len(card.taken) == 6)
        await big(peer, b"big 2")
        card.go.set()
        await eventually(lambda: len(card.taken) == 9 and consumer.in_hand == 0)
        assert card.most == 3


async def test_under_load_from_both_queues_nothing_is_lost_and_never_more_is_unacknowledged(amqp_url: str) -> None:
    done: Counter[bytes] = Counter()
    in_hand, most = 0, 0

    async def handle(delivery: AmqpDelivery) -> None:
        nonlocal in_hand, most
        in_hand += 1
        most = max(most, in_hand)
        await asyncio.sleep(0.01)
        in_hand -= 1
        done[delivery.body] += 1
        await delivery.settle(Verdict.ACK)

    card = TierWorker()
    card.hold = handle  # type: ignore[method-assign]
    wanted = {b"%d" % number for number in range(200)}
    async with Peer(amqp_url) as peer, worker(amqp_url, card, LARGE, queue_workers=4, queue_maxsize=500):
        for number, body in enumerate(sorted(wanted)):
            if number % 5 == 0:
                await big(peer, body)
            else:
                await peer.request(body)
            if number % 20 == 0:
                await asyncio.sleep(0.05)  # so that the queues run empty and fill again
        await eventually(lambda: set(done) == wanted, 60)
    assert (set(done.values()), most <= 4) == ({1}, True)


async def test_requests_of_a_tier_that_nobody_has_any_more_are_taken_by_whoever_is_there(amqp_url: str) -> None:
    card = TierWorker()
    async with Peer(amqp_url) as peer, worker(amqp_url, card, "tier1", queue_workers=2, unattended_s=0.5):
        await big(peer, b"left behind")
        await eventually(lambda: card.of(LARGE) == [b"left behind"])
        assert await card.taken[0].forward(LARGE) is False
        card.go.set()


async def test_a_tier_with_a_worker_keeps_its_requests_however_long_they_wait(amqp_url: str) -> None:
    small, large = TierWorker(), TierWorker()
    async with (
        Peer(amqp_url) as peer,
        worker(amqp_url, large, LARGE, queue_workers=1),
        worker(amqp_url, small, "tier1", queue_workers=1, unattended_s=0.1),
    ):
        await big(peer, b"0", b"1")
        await eventually(lambda: large.of(LARGE) == [b"0"])
        await eventually(lambda: small.calls > 5)
        assert (small.taken, await peer.ready(LARGE_QUEUE)) == ([], 1)
        large.go.set()
        await eventually(lambda: large.of(LARGE) == [b"0", b"1"])


async def test_who_stops_is_not_sent_anything_more(amqp_url: str) -> None:
    async with small_and_large(amqp_url) as (_, small, _):
        other = TierWorker()
        async with worker(amqp_url, other, "tier6") as (_, tiers):
            assert await small.taken[0].forward("tier6") is True
            await tiers.stop()
            assert await small.taken[1].forward("tier6") is False
            other.go.set()


async def test_who_lost_the_broker_is_there_again_when_it_is_back(amqp_url: str) -> None:
    async with small_and_large(amqp_url) as (_, small, _):
        other = TierWorker()
        async with worker(amqp_url, other, "tier6") as (_, tiers):
            tiers._connection.reconnect("a test")

            async def again() -> bool:
                return await small.taken[0].forward("tier6")

            await until(again, "the worker of tier 6 is there")
            await eventually(lambda: b"big 0" in other.of("tier6"))
            other.go.set()


async def test_a_request_that_expires_in_the_queue_of_a_tier_is_given_up_there(amqp_url: str) -> None:
    """What it waited before counts: of two hours it had an hour and a half already."""
    async with small_and_large(amqp_url) as (peer, small, large):
        await sent_on(small)
        await eventually(lambda: large.in_hand == 2)
        sent, headers = time.time() - 5_400, {"traceparent": "00-a"}
        await peer.request(b"late", expiration=7_200, timestamp=sent, message_id="late", headers=headers)
        await eventually(lambda: small.taken[-1].body == b"late")
        assert await small.taken[-1].forward(LARGE) is True
        waiting = await peer.look(LARGE_QUEUE)
        assert waiting.expiration == pytest.approx(1_800, abs=60)
        # The expiration is part of what tells two messages apart, and forwarding takes it off.
        ours = {"x-acestep-expiration": "7200000", "x-acestep-tiers": LARGE}
        assert (waiting.message_id, waiting.headers) == ("late", headers | ours)
        await waiting.nack()


async def test_what_would_expire_on_its_arrival_there_stays(amqp_url: str) -> None:
    """It was delivered in time; a producer's clock that is an hour late says something else."""
    async with small_and_large(amqp_url) as (peer, small, large):
        await sent_on(small)
        await eventually(lambda: large.in_hand == 2)
        await peer.request(b"late", expiration=60, timestamp=time.time() - 3_600)
        await eventually(lambda: small.taken[-1].body == b"late")
        assert await small.taken[-1].forward(LARGE) is False
        assert await peer.ready(LARGE_QUEUE) == 0


async def test_copies_that_its_producer_wanted_are_not_made_once_more(amqp_url: str) -> None:
    """Else each worker that sends it on would put another copy into the producers' queue, and so without end."""
    async with small_and_large(amqp_url) as (peer, small, large):
        await sent_on(small)
        await eventually(lambda: large.in_hand == 2)
        await peer.request(b"big", headers={"CC": [GENERATE]})
        await eventually(lambda: small.taken[-1].body == b"big")
        assert await small.taken[-1].forward(LARGE) is True
        await peer.request(b"after")
        await eventually(lambda: small.taken[-1].body == b"after")
        assert [delivery.body for delivery in small.taken].count(b"big") == 1


async def test_it_was_sent_on_even_if_the_call_that_it_is_there_got_lost(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said otherwise, it would go back as well and be done twice."""
    call, calls = Publisher.notify_tier, 0

    async def only_once(publisher: Publisher, tier: str) -> bool:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise Unpublished("a test")
        return await call(publisher, tier)

    async with small_and_large(amqp_url) as (_, small, _):
        monkeypatch.setattr(Publisher, "notify_tier", only_once)
        assert await small.taken[0].forward(LARGE) is True
        assert calls == 2


async def test_who_pauses_is_not_sent_anything_until_it_goes_on(amqp_url: str) -> None:
    async with small_and_large(amqp_url) as (_, small, _):
        other = TierWorker()
        async with worker(amqp_url, other, "tier6") as (consumer, tiers):
            await consumer.pause("a test")
            tiers.look()
            await eventually(lambda: not tiers._bound)
            assert await small.taken[0].forward("tier6") is False
            await consumer.resume("a test")
            tiers.look()
            await eventually(lambda: tiers._bound)
            assert await small.taken[0].forward("tier6") is True
            other.go.set()


async def test_while_the_queues_are_out_of_sight_no_place_is_kept_for_them(amqp_url: str) -> None:
    card = TierWorker()
    async with (
        Peer(amqp_url) as peer,
        Proxy.for_url(amqp_url) as proxy,
        worker(amqp_url, card, LARGE, queue_workers=1, control_url=proxy.url(amqp_url)) as (consumer, _),
    ):
        await peer.request(b"first")
        await eventually(lambda: card.in_hand == 1)
        await big(peer, b"taken by another")
        await eventually(lambda: consumer._tier_targets.get(LARGE_QUEUE) == 1)
        proxy.refuse()
        await peer.take(LARGE_QUEUE)
        await peer.request(b"second")
        await card.finish(1)
        await eventually(lambda: card.of(None) == [b"first", b"second"])
        proxy.heal()
        card.go.set()


async def test_a_queue_that_is_gone_does_not_keep_the_producers_queue_from_being_served(amqp_url: str) -> None:
    card, settings = TierWorker(), broker_settings(amqp_url, queue_workers=2)
    async with (
        Peer(amqp_url) as peer,
        BrokerConnection(settings, "consume") as connection,
        BrokerConnection(settings, "publish") as out,
    ):
        consumer = Consumer(connection, settings, card.hold, Publisher(out, "w1"))
        await connection.declare_tier_queue(LARGE)
        await consumer.start()
        await consumer.serve(LARGE_QUEUE, 1)
        await peer.channel.queue_delete(LARGE_QUEUE)
        await eventually(lambda: not connection.is_up)
        await peer.request(b"small")
        await eventually(lambda: card.of(None) == [b"small"])
        card.go.set()
        await consumer.drain(0)


async def test_a_queue_that_stands_keeps_its_limit_and_with_other_settings_is_refused(amqp_url: str) -> None:
    """One that drops what is too much, or lets it expire unheard, would lose requests."""
    async with Peer(amqp_url) as peer:
        async with BrokerConnection(broker_settings(amqp_url, queue_maxsize=5), "a worker") as connection:
            await connection.declare_tier_queue(LARGE)
        await peer.channel.queue_delete(GENERATE)
        await peer.channel.declare_queue(tier_queue("tier6"), durable=True)
        async with BrokerConnection(broker_settings(amqp_url, queue_maxsize=7), "another") as connection:
            await connection.declare_tier_queue(LARGE)
            with pytest.raises(BrokerRefused, match="tier6"):
                await connection.declare_tier_queue("tier6")


@pytest.fixture
def url_of_who_may_not_call(rabbitmq: RabbitMQ, management: ManagementApi, amqp_vhost: str) -> Iterator[str]:
    """A user with all permissions but that to ask for workers of a tier."""
    name, everything = f"user-{uuid.uuid4().hex}", {"configure": ".*", "write": ".*", "read": ".*"}
    management.call("PUT", f"/api/users/{name}", {"password": name, "tags": ""})
    management.call("PUT", f"/api/permissions/{amqp_vhost}/{name}", everything)
    # RabbitMQ 4.3 wants the exchange to be there first.
    management.call("PUT", f"/api/exchanges/{amqp_vhost}/{CONTROL}", {"type": "topic", "durable": True})
    only = {"exchange": CONTROL, "write": "^sync[.].*$", "read": ".*"}
    management.call("PUT", f"/api/topic-permissions/{amqp_vhost}/{name}", only)
    yield f"amqp://{name}:{name}@127.0.0.1:{rabbitmq.port}/{amqp_vhost}"
    management.call("DELETE", f"/api/users/{name}")


async def test_who_may_not_call_does_not_start_and_who_may_not_any_more_sends_nothing_on(
    url_of_who_may_not_call: str,
) -> None:
    url = url_of_who_may_not_call
    with pytest.raises(BrokerRefused, match=f"{TIER}.{LARGE}"):
        async with worker(url, TierWorker(), LARGE):
            pass
    async with BrokerConnection(broker_settings(url), "publish") as out:
        properties = aio_pika.Message(b"").properties
        assert await Publisher(out, "w1").forward(b"big", properties, LARGE) is False


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_whatever_changes_at_once_nothing_is_lost_and_never_more_is_unacknowledged(
    amqp_url: str, queue_type: str
) -> None:
    """Shares, prefetch, pauses and lost connections, in any order."""
    chance = random.Random(7)  # noqa: S311 - a repeatable run
    done: set[bytes] = set()
    in_hand: set[AmqpDelivery] = set()
    most = 0

    async def handle(delivery: AmqpDelivery) -> None:
        nonlocal most
        in_hand.add(delivery)
        most = max(most, sum(not each.stale for each in in_hand))
        await asyncio.sleep(chance.uniform(0, 0.05))
        in_hand.discard(delivery)
        done.add(delivery.body)
        await delivery.settle(Verdict.ACK)

    settings = broker_settings(amqp_url, queue_workers=3, queue_type=queue_type, queue_maxsize=500)
    async with (
        Peer(amqp_url) as peer,
        BrokerConnection(settings, "consume") as connection,
        BrokerConnection(settings, "publish") as out,
    ):
        consumer = Consumer(connection, settings, handle, Publisher(out, "w1"))
        await connection.declare_tier_queue(LARGE)
        await consumer.start()
        changes = (
            lambda: consumer.serve(LARGE_QUEUE, chance.randint(0, 5)),
            lambda: consumer.set_prefetch(chance.randint(1, 4)),
            lambda: consumer.pause("a test"),
            lambda: consumer.resume("a test"),
        )
        async with asyncio.TaskGroup() as going:
            for number in range(30):
                await peer.channel.default_exchange.publish(aio_pika.Message(b"big %d" % number), LARGE_QUEUE)
                await peer.request(b"small %d" % number)
                going.create_task(chance.choice(changes)())
                if number % 10 == 9:
                    connection.reconnect("a test")
                await asyncio.sleep(chance.uniform(0, 0.05))
        await connection.channel()
        await consumer.resume("a test")
        await consumer.set_prefetch(2)
        await consumer.serve(LARGE_QUEUE, 1)
        await eventually(lambda: len(done) == 60)
        await eventually(lambda: consumer.in_hand == 0)
        assert most <= 4
        assert [await peer.ready(queue) for queue in (GENERATE, LARGE_QUEUE)] == [0, 0]
        await consumer.drain(0)


async def big(peer: Peer, *bodies: bytes) -> None:
    """Put requests into the queue of the large tier as a worker does, and call."""
    for body in bodies:
        await peer.channel.default_exchange.publish(aio_pika.Message(body), LARGE_QUEUE)
    control = await peer.channel.get_exchange(CONTROL, ensure=False)
    await control.publish(aio_pika.Message(b""), f"{TIER}.{LARGE}", mandatory=False)


async def ready_is(peer: Peer, queue: str, count: int) -> bool:
    return await peer.ready(queue) == count
