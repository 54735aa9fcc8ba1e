# SPDX-License-Identifier: Apache-2.0
"""Publishing on a real broker: confirmed, in order, on through a lost connection, and never silently nowhere."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from pamqp.commands import Basic

from acestep_consumer.broker import connection as connection_module
from acestep_consumer.broker import publisher as publisher_module
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.topology import DEAD_LETTER, EVENTS, GENERATE, UNROUTED
from acestep_consumer.domain.errors import MalformedBody, Unpublished
from acestep_consumer.domain.ports import Reply
from acestep_schemas.events import Worker, WorkerEvent, parse_event
from tests.support.broker import Peer, broker_settings, failed_event, progress_event, until
from tests.support.proxy import Proxy
from tests.support.waiting import WITHIN_S, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NOBODY = Reply()


@pytest.fixture
async def proxy(amqp_url: str) -> AsyncIterator[Proxy]:
    async with Proxy.for_url(amqp_url) as running:
        yield running


@pytest.fixture
async def connection(proxy: Proxy, amqp_url: str) -> AsyncIterator[BrokerConnection]:
    async with BrokerConnection(broker_settings(proxy.url(amqp_url)), "publish") as running:
        yield running


@pytest.fixture
async def publisher(connection: BrokerConnection) -> Publisher:
    return Publisher(connection, "w1")


@pytest.fixture
async def peer(amqp_url: str, connection: BrokerConnection) -> AsyncIterator[Peer]:
    async with Peer(amqp_url) as running:
        yield running


async def test_an_event_carries_its_envelope_in_the_properties(publisher: Publisher, peer: Peer) -> None:
    queue = await peer.subscribe("job.failed.t1")
    event = failed_event("t1")
    await publisher.publish(event, Reply(reply_to=None, correlation_id="c1"))
    heard = await peer.take(queue)
    assert parse_event(heard.body) == event
    assert (heard.message_id, heard.type, heard.correlation_id) == (event.id, event.type, "c1")
    assert (heard.content_type, heard.app_id) == ("application/cloudevents+json", "acestep-consumer")
    assert heard.delivery_mode == 2
    assert heard.timestamp == event.time.replace(microsecond=0)


async def test_an_event_that_nobody_is_bound_to_hear_is_kept_and_no_error(publisher: Publisher, peer: Peer) -> None:
    await publisher.publish(failed_event("t1"), NOBODY)
    heard = await peer.take(UNROUTED)
    assert heard.routing_key == "job.failed.t1"


async def test_a_worker_announces_itself(publisher: Publisher, peer: Peer) -> None:
    queue = await peer.subscribe("worker.ready.#")
    worker = Worker(worker_id="w1", state="ready", prefetch=1, models=("m",), tier="tier1", vram_gb=0)
    await publisher.announce(WorkerEvent.of(worker))
    assert (await peer.take(queue)).routing_key == "worker.ready.w1"


async def test_events_arrive_in_the_order_of_the_calls_though_many_are_in_flight(
    publisher: Publisher, peer: Peer
) -> None:
    queue = await peer.subscribe("job.progress.#")
    events = [progress_event("t1", sequence) for sequence in range(1, 201)]
    await asyncio.gather(*(publisher.publish(event, NOBODY) for event in events))
    assert [(await peer.take(queue)).message_id for _ in events] == [event.id for event in events]


async def test_a_terminal_event_is_answered_to_reply_to_as_well_and_progress_is_not(
    publisher: Publisher, peer: Peer
) -> None:
    mine = await peer.channel.declare_queue(exclusive=True)
    reply = Reply(reply_to=mine.name, correlation_id="c1")
    await publisher.publish(progress_event("t1", 1), reply)
    event = failed_event("t1")
    await publisher.publish(event, reply)
    heard = await peer.take(mine.name)
    assert (parse_event(heard.body), heard.correlation_id) == (event, "c1")
    assert await peer.ready(mine.name) == 0


@pytest.mark.parametrize(
    "reply_to",
    [
        "nobody-is-here",
        "amq.rabbitmq.reply-to",
        # The broker ends the whole connection over this one.
        "amq.rabbitmq.reply-to.g1h2AA5yZXBseUAxMTExMTExMQAAB9EAAAAAY3mtyw==.abc",
    ],
)
async def test_a_reply_to_that_leads_nowhere_does_not_hold_up_the_job(
    publisher: Publisher, peer: Peer, reply_to: str
) -> None:
    queue = await peer.subscribe("job.failed.t1")
    async with asyncio.timeout(WITHIN_S):
        await publisher.publish(failed_event("t1"), Reply(reply_to=reply_to, correlation_id=None))
        await publisher.publish(failed_event("t2"), NOBODY)
    assert await peer.ready(queue) == 1


async def test_a_producers_full_queue_is_neither_counted_as_a_fault_nor_costs_the_connection(
    connection: BrokerConnection, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "RECONNECT_INTERVAL_S", 0.0)
    channel, faults = await connection.channel(), list[Exception]()
    full = await peer.channel.declare_queue(
        exclusive=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"}
    )
    reply = Reply(reply_to=full.name, correlation_id=None)
    await Publisher(connection, "w1", faults.append).publish(failed_event("t1"), reply)
    assert faults == []
    assert await connection.channel() is channel


async def test_no_event_is_lost_when_the_connection_is_cut_among_many_in_flight(
    publisher: Publisher, peer: Peer, proxy: Proxy
) -> None:
    queue = await peer.subscribe("job.failed.#")
    events = [failed_event(f"t{number}") for number in range(500)]
    proxy.drop_after(120_000)
    await asyncio.gather(*(publisher.publish(event, NOBODY) for event in events))
    assert proxy.accepted >= 2
    heard = {(await peer.take(queue)).message_id for _ in range(await peer.ready(queue))}
    assert heard == {event.id for event in events}


async def test_a_publish_waits_for_a_broker_that_is_away_and_then_gives_up(
    publisher: Publisher, proxy: Proxy, connection: BrokerConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "PATIENCE_S", 0.5)
    proxy.refuse()
    await eventually(lambda: not connection.is_up)
    with pytest.raises(Unpublished, match=r"job\.failed\.t1"):
        await publisher.publish(failed_event("t1"), NOBODY)
    proxy.heal()
    monkeypatch.setattr(publisher_module, "PATIENCE_S", 20)
    await publisher.publish(failed_event("t1"), NOBODY)


async def test_a_connection_that_stands_still_does_not_hold_progress_for_long(
    publisher: Publisher, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "SHORT_PATIENCE_S", 0.3)
    proxy.stall()
    with pytest.raises(Unpublished, match="no confirm"):
        await publisher.publish(progress_event("t1", 1), NOBODY)
    proxy.heal()


@pytest.mark.parametrize("queue", [GENERATE, DEAD_LETTER, UNROUTED])
async def test_an_answer_is_never_put_into_a_queue_of_ours(publisher: Publisher, peer: Peer, queue: str) -> None:
    """The worker may write there; whoever sent the request may not."""
    mine = await peer.subscribe("job.#")
    await publisher.publish(failed_event("t1"), Reply(reply_to=queue, correlation_id=None))
    assert (await peer.take(mine)).routing_key == "job.failed.t1"
    assert await peer.ready(queue) == 0


async def test_a_refused_event_is_offered_again_until_there_is_room(publisher: Publisher, peer: Peer) -> None:
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
    queue = await peer.subscribe("job.failed.#", **limits)
    await publisher.publish(failed_event("t1"), NOBODY)
    waiting = asyncio.create_task(publisher.publish(failed_event("t2"), NOBODY))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    assert (await peer.take(queue)).routing_key == "job.failed.t1"
    await waiting
    assert (await peer.take(queue)).routing_key == "job.failed.t2"


async def test_an_event_that_is_refused_for_too_long_raises(
    publisher: Publisher, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "PATIENCE_S", 0.5)
    await peer.subscribe("job.failed.#", **{"x-max-length": 0, "x-overflow": "reject-publish"})
    with pytest.raises(Unpublished, match="Nack"):
        await publisher.publish(failed_event("t1"), NOBODY)


async def test_an_exchange_or_a_queue_that_was_deleted_is_made_again(publisher: Publisher, peer: Peer) -> None:
    await peer.channel.exchange_delete(EVENTS)
    await publisher.publish(failed_event("t1"), NOBODY)
    await peer.channel.queue_delete(UNROUTED)
    await publisher.publish(failed_event("t2"), NOBODY)
    await peer.channel.queue_delete(DEAD_LETTER)
    await publisher.dead_letter(b"body", Basic.Properties(), None)
    assert (await peer.take(UNROUTED)).routing_key == "job.failed.t2"
    assert (await peer.take(DEAD_LETTER)).body == b"body"


async def test_dead_letters_with_one_id_are_all_kept(publisher: Publisher, peer: Peer) -> None:
    await peer.channel.queue_delete(DEAD_LETTER)
    same = Basic.Properties(message_id="same")
    await asyncio.gather(*(publisher.dead_letter(b"%d" % number, same, MalformedBody("no")) for number in range(20)))

    async def all_there() -> bool:
        return await peer.ready(DEAD_LETTER) == 20

    await until(all_there, "20 dead letters")
