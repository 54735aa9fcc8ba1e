# SPDX-License-Identifier: Apache-2.0
"""What RabbitMQ 4.3 alone does to a quorum queue's deliveries: late ones go back, a redelivery may wait, priorities."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from acestep_consumer.broker import consumer as consumer_module
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE
from acestep_consumer.domain.errors import Verdict
from infra.local import rabbitmq4
from tests.support.broker import Peer, broker_settings, until
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from acestep_consumer.broker.delivery import AmqpDelivery
    from tests.support.servers import ManagementApi

pytestmark = [
    pytest.mark.broker_versions,
    pytest.mark.skipif(
        not rabbitmq4.wanted(), reason="older versions ignore these arguments: bash infra/dev test --rabbitmq 4"
    ),
]

TIMEOUT_MS = 2_000
DELAY_MS = 2_000


@asynccontextmanager
async def consuming(
    url: str, handle: Callable[[AmqpDelivery], Awaitable[None]], workers: int = 1
) -> AsyncIterator[Consumer]:
    """A consumer of a quorum queue that calls ``handle``."""
    settings = broker_settings(url, queue_type="quorum", queue_workers=workers)
    async with BrokerConnection(settings, "in") as connection, BrokerConnection(settings, "out") as out:
        consumer = Consumer(connection, settings, handle, Publisher(out, "w1"))
        await consumer.start()
        yield consumer
        await consumer.drain(0)


async def test_a_delivery_that_the_broker_takes_back_is_stale_and_the_message_comes_again(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker asks for a week. An operator's policy cannot make it less, but the next version may."""
    monkeypatch.setattr(consumer_module, "CONSUMER_TIMEOUT_MS", TIMEOUT_MS)
    taken: list[AmqpDelivery] = []
    go = asyncio.Event()

    async def hold(delivery: AmqpDelivery) -> None:
        taken.append(delivery)
        if len(taken) == 1:
            await go.wait()
        await delivery.settle(Verdict.ACK)

    async with Peer(amqp_url) as peer, consuming(amqp_url, hold, workers=2) as consumer:
        await peer.request(b"long", message_id="a")
        await eventually(lambda: len(taken) == 2)
        first, second = taken
        assert (first.stale, second.redelivered) == (True, True)
        assert first.fingerprint == second.fingerprint
        go.set()
        await eventually(lambda: not consumer.in_hand)
        await peer.request(b"short")
        await eventually(lambda: len(taken) == 3 and not consumer.in_hand)
        await until(lambda: _is_empty(peer), "the queue is empty")
        assert await peer.ready(DEAD_LETTER) == 0


async def test_a_message_that_goes_back_may_come_again_later(
    amqp_url: str, amqp_vhost: str, management: ManagementApi
) -> None:
    """Operators can have the broker wait before it redelivers; meanwhile other messages are worked on."""
    delays = {"delayed-retry-type": "all", "delayed-retry-min": DELAY_MS, "delayed-retry-max": DELAY_MS}
    policy = {"pattern": "^acestep[.]generate$", "definition": delays}
    await asyncio.to_thread(management.call, "PUT", f"/api/policies/{quote(amqp_vhost, safe='')}/delay", policy)
    taken: list[AmqpDelivery] = []
    loop, at_s = asyncio.get_running_loop(), list[float]()

    async def return_first(delivery: AmqpDelivery) -> None:
        taken.append(delivery)
        at_s.append(loop.time())
        await delivery.settle(Verdict.REQUEUE if len(taken) == 1 else Verdict.ACK)

    async with Peer(amqp_url) as peer, consuming(amqp_url, return_first) as consumer:
        await peer.request(b"one", message_id="a")
        await eventually(lambda: taken)
        await peer.request(b"two")
        await eventually(lambda: len(taken) == 3 and not consumer.in_hand)
        seen = [(delivery.body, delivery.redelivered) for delivery in taken]
        assert seen == [(b"one", False), (b"two", False), (b"one", True)]
        assert taken[0].fingerprint == taken[2].fingerprint
        assert at_s[2] - at_s[0] >= DELAY_MS / 1_000
        await until(lambda: _is_empty(peer), "the queue is empty")


async def test_a_quorum_queue_honours_all_priorities(amqp_url: str) -> None:
    """From RabbitMQ 4.3 on; 4.0 to 4.2 know two of them."""
    taken: list[bytes] = []
    go = asyncio.Event()

    async def hold(delivery: AmqpDelivery) -> None:
        taken.append(delivery.body)
        await go.wait()
        await delivery.settle(Verdict.ACK)

    async with Peer(amqp_url) as peer, consuming(amqp_url, hold) as consumer:
        await peer.request(b"first")
        await eventually(lambda: taken)
        for priority in (0, 3, 9, 6):
            await peer.request(b"%d" % priority, priority=priority)
        go.set()
        await eventually(lambda: len(taken) == 5 and not consumer.in_hand)
    assert taken == [b"first", b"9", b"6", b"3", b"0"]


async def _is_empty(peer: Peer) -> bool:
    return await peer.ready(GENERATE) == 0
