# SPDX-License-Identifier: Apache-2.0
"""What the story may expect of a `Delivery`, held by the fake and by one from a real broker."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.delivery import AlreadySettledError, AmqpDelivery
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE
from acestep_consumer.domain.errors import MalformedBody, Verdict
from acestep_consumer.domain.ports import Reply
from tests.support.broker import Peer, broker_settings, until
from tests.support.fakes import FakeDelivery
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from acestep_consumer.domain import ports

REASON = MalformedBody("no")


class DeliverySource(Protocol):
    """Where a delivery comes from, and where its message is afterwards."""

    async def deliver(self, body: bytes, message_id: str, reply: Reply) -> ports.Delivery:
        """Send a message and take its delivery."""

    async def lose_channel(self) -> None:
        """Make the delivery stale."""

    async def is_now(self, place: str) -> bool:
        """Whether the message is ``gone``, ``back`` (ready for the next consumer) or ``dead: <code>``."""


class Fake:
    def __init__(self) -> None:
        self._delivery = FakeDelivery()

    async def deliver(self, body: bytes, message_id: str, reply: Reply) -> ports.Delivery:
        self._delivery = FakeDelivery(body=body, message_id=message_id, reply=reply)
        return self._delivery

    async def lose_channel(self) -> None:
        self._delivery.stale = True

    async def is_now(self, place: str) -> bool:
        match self._delivery.verdict:
            case Verdict.DEAD_LETTER:
                return place == f"dead: {self._delivery.reason.code if self._delivery.reason else None}"
            case Verdict.REQUEUE:
                return place == "back"
        return place == ("back" if self._delivery.stale else "gone")


class Real:
    """Takes one delivery and then no other, so that a message that comes back can be seen."""

    def __init__(
        self, consumer: Consumer, peer: Peer, connection: BrokerConnection, taken: asyncio.Queue[AmqpDelivery]
    ) -> None:
        self._consumer, self._peer, self._connection, self._taken = consumer, peer, connection, taken

    async def deliver(self, body: bytes, message_id: str, reply: Reply) -> ports.Delivery:
        properties = {"reply_to": reply.reply_to, "correlation_id": reply.correlation_id}
        await self._peer.request(body, message_id=message_id, **properties)
        delivery = await self._taken.get()
        await self._consumer.stop_consuming()
        return delivery

    async def lose_channel(self) -> None:
        old = await self._connection.channel()
        self._connection.reconnect("a test")
        await eventually(lambda: old.is_closed and self._connection.is_up)

    async def is_now(self, place: str) -> bool:
        channel = await self._connection.channel()
        await channel.basic_qos(prefetch_count=1)  # once this is answered, the broker has seen the verdict
        ready, dead = await self._peer.ready(GENERATE), await self._peer.ready(DEAD_LETTER)
        if dead:
            letter = await self._peer.look(DEAD_LETTER)
            await letter.nack(requeue=True)
            return place == f"dead: {letter.headers['x-acestep-code']!s}" and not ready
        return place == ("back" if ready else "gone")


@pytest.fixture(params=["fake", "real"])
async def source(request: pytest.FixtureRequest) -> AsyncIterator[DeliverySource]:
    if request.param == "fake":
        yield Fake()
        return
    taken: asyncio.Queue[AmqpDelivery] = asyncio.Queue()

    async def keep(delivery: AmqpDelivery) -> None:
        taken.put_nowait(delivery)
        await asyncio.Event().wait()

    settings = broker_settings(request.getfixturevalue("amqp_url"))
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(BrokerConnection(settings, "consume"))
        out = await stack.enter_async_context(BrokerConnection(settings, "publish"))
        consumer = Consumer(connection, settings, keep, Publisher(out, "w1"))
        await consumer.start()
        peer = await stack.enter_async_context(Peer(request.getfixturevalue("amqp_url")))
        yield Real(consumer, peer, connection, taken)
        await consumer.drain(0)


async def delivered(source: DeliverySource) -> ports.Delivery:
    return await source.deliver(b"{}", "m1", Reply(reply_to="r1", correlation_id="c1"))


class TestDelivery:
    async def test_it_shows_the_message_as_it_came(self, source: DeliverySource) -> None:
        delivery = await delivered(source)
        assert (delivery.body, delivery.message_id, delivery.redelivered) == (b"{}", "m1", False)
        assert (delivery.reply.reply_to, delivery.reply.correlation_id) == ("r1", "c1")
        assert delivery.queued_s is None
        await delivery.settle(Verdict.ACK)

    @pytest.mark.parametrize(
        ("verdict", "place"),
        [(Verdict.ACK, "gone"), (Verdict.REQUEUE, "back"), (Verdict.DEAD_LETTER, "dead: malformed_body")],
    )
    async def test_the_verdict_decides_where_the_message_goes(
        self, source: DeliverySource, verdict: Verdict, place: str
    ) -> None:
        delivery = await delivered(source)
        await delivery.settle(verdict, REASON)
        await until(lambda: source.is_now(place), place)

    async def test_a_second_verdict_is_a_mistake(self, source: DeliverySource) -> None:
        delivery = await delivered(source)
        await delivery.settle(Verdict.ACK)
        with pytest.raises(AlreadySettledError):
            await delivery.settle(Verdict.REQUEUE)
        assert await source.is_now("gone")

    @pytest.mark.parametrize("verdict", [Verdict.ACK, Verdict.DEAD_LETTER])
    async def test_a_stale_delivery_is_left_to_the_next_consumer(
        self, source: DeliverySource, verdict: Verdict
    ) -> None:
        delivery = await delivered(source)
        await source.lose_channel()
        await delivery.settle(verdict, REASON)
        await until(lambda: source.is_now("back"), "back")
