# SPDX-License-Identifier: Apache-2.0
"""A message without an id whose worker loses a connection while it gives it one: one copy, and so one job."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from acestep_consumer.broker import publisher as publisher_module
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.delivery import AmqpDelivery
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.domain.errors import Unpublished, Verdict
from tests.support.broker import broker_settings
from tests.support.nameless import Nameless
from tests.support.proxy import Proxy
from tests.support.servers import ManagementApi
from tests.support.waiting import eventually


class Identifying:
    """Gives an id to what has none, and holds what has one. ``breaks`` is called with the first delivery."""

    def __init__(self, breaks: Callable[[AmqpDelivery], Awaitable[None]]) -> None:
        self._breaks = breaks
        self.copies: list[str] = []
        self.originals = 0
        self.given_up = 0

    async def handle(self, delivery: AmqpDelivery) -> None:
        if delivery.message_id is not None:
            self.copies.append(delivery.message_id)
            await delivery.settle(Verdict.ACK)
            return
        self.originals += 1
        if self.originals == 1:
            await self._breaks(delivery)
        try:
            await delivery.identify()
        except Unpublished:
            self.given_up += 1
            await delivery.settle(Verdict.REQUEUE)
        else:
            await delivery.settle(Verdict.ACK)

    def assert_copied_once(self) -> None:
        """Every delivery but the last was given up, which may have come over a connection that is lost, too."""
        assert (self.given_up, len(self.copies)) == (self.originals - 1, 1)


@asynccontextmanager
async def consuming(identifying: Identifying, consume_url: str, publish_url: str) -> AsyncIterator[Consumer]:
    """A consumer with two connections, as a worker has it."""
    async with (
        BrokerConnection(broker_settings(consume_url), "consume") as connection,
        BrokerConnection(broker_settings(publish_url), "publish") as out,
    ):
        consumer = Consumer(
            connection, broker_settings(consume_url, queue_workers=2), identifying.handle, Publisher(out, "w")
        )
        await consumer.start()
        yield consumer
        await consumer.drain(0)


@pytest.fixture
def nameless(management: ManagementApi, amqp_vhost: str) -> Nameless:
    return Nameless(management, amqp_vhost)


async def test_a_request_that_will_come_again_is_not_copied(amqp_url: str, nameless: Nameless) -> None:
    async with Proxy.for_url(amqp_url) as wire:

        async def cut(delivery: AmqpDelivery) -> None:
            wire.cut()
            await eventually(lambda: delivery.stale)

        identifying = Identifying(cut)
        async with consuming(identifying, wire.url(amqp_url), amqp_url):
            await nameless.request("jazz")
            await eventually(lambda: identifying.copies)
        identifying.assert_copied_once()
        assert identifying.given_up


async def test_a_request_whose_connection_fell_silent_is_not_copied_over_the_other(
    amqp_url: str, nameless: Nameless
) -> None:
    async with Proxy.for_url(amqp_url) as wire:

        async def fall_silent(_: AmqpDelivery) -> None:
            wire.stall()
            asyncio.get_running_loop().call_later(1, wire.cut)  # or the heartbeat's end, half a minute later
            asyncio.get_running_loop().call_later(1, wire.heal)

        identifying = Identifying(fall_silent)
        async with consuming(identifying, wire.url(amqp_url), amqp_url):
            await nameless.request("jazz")
            await eventually(lambda: identifying.copies)
        identifying.assert_copied_once()
        assert identifying.given_up


async def test_a_broker_that_confirms_late_gets_one_copy(
    amqp_url: str, nameless: Nameless, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while it is short of memory: the request must not go back while its copy may be on the way."""
    monkeypatch.setattr(publisher_module, "PATIENCE_S", 0.2)
    async with Proxy.for_url(amqp_url) as wire:

        async def stall(_: AmqpDelivery) -> None:
            wire.stall()
            asyncio.get_running_loop().call_later(1, wire.heal)

        identifying = Identifying(stall)
        async with consuming(identifying, amqp_url, wire.url(amqp_url)):
            await nameless.request("jazz")
            await eventually(lambda: identifying.copies)
        identifying.assert_copied_once()
        assert not identifying.given_up
