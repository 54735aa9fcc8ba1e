# SPDX-License-Identifier: Apache-2.0
"""Several reasons to take nothing new, at once and one after the other, against a real broker."""

import asyncio

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.delivery import AmqpDelivery
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.topology import GENERATE
from acestep_consumer.domain.errors import Verdict
from tests.support.broker import Peer, broker_settings
from tests.support.waiting import eventually


async def test_consuming_goes_on_when_the_last_reason_is_gone(amqp_url: str) -> None:
    settings = broker_settings(amqp_url, queue_workers=2)
    done: list[bytes] = []

    async def handle(delivery: AmqpDelivery) -> None:
        done.append(delivery.body)
        await delivery.settle(Verdict.ACK)

    async with (
        BrokerConnection(settings, "consume") as connection,
        BrokerConnection(settings, "publish") as out,
        Peer(amqp_url) as peer,
    ):
        consumer = Consumer(connection, settings, handle, Publisher(out, "w1"))
        await consumer.pause("disk")
        await consumer.start()
        await consumer.pause("storage")
        await consumer.pause("storage")
        await peer.request(b"1")
        for reason in ("disk", "disk"):
            await consumer.resume(reason)
            for _ in range(5):
                assert await peer.ready(GENERATE) == 1
                await asyncio.sleep(0.05)
        await consumer.resume("storage")
        await eventually(lambda: done == [b"1"])
        await consumer.drain(0)
