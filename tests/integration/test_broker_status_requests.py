# SPDX-License-Identifier: Apache-2.0
"""Who is there: one message on the control exchange, one announcement of each worker."""

import asyncio

import aio_pika
import pytest

from acestep_consumer.broker import status_requests as module
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.status_requests import StatusRequests
from acestep_consumer.broker.topology import CONTROL
from tests.support.broker import Peer, broker_settings
from tests.support.waiting import eventually


async def ask(peer: Peer, reply_to: str | None = None) -> None:
    exchange = await peer.channel.get_exchange(CONTROL, ensure=False)
    await exchange.publish(aio_pika.Message(b"\xff", reply_to=reply_to), "status")


async def test_every_worker_that_listens_announces_itself(amqp_url: str) -> None:
    heard: list[str] = []

    def announcing(name: str) -> StatusRequests:
        async def announce() -> None:
            heard.append(name)

        return StatusRequests(connection, announce)

    async with BrokerConnection(broker_settings(amqp_url), "control") as connection, Peer(amqp_url) as peer:
        for name in ("one", "two"):
            await announcing(name).start()
        await ask(peer, reply_to="amq.rabbitmq.reply-to.nonsense")
        await eventually(lambda: sorted(heard) == ["one", "two"])


async def test_a_crowd_of_questions_gets_one_answer_a_while(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_INTERVAL_S", 60.0)
    heard: list[str] = []

    async def announce() -> None:
        heard.append("here")

    async with BrokerConnection(broker_settings(amqp_url), "control") as connection, Peer(amqp_url) as peer:
        requests = StatusRequests(connection, announce)
        await requests.start()
        await ask(peer)
        await eventually(lambda: heard)
        await asyncio.gather(*(ask(peer) for _ in range(20)))
        await requests.stop()
    assert heard == ["here"]


async def test_it_is_asked_again_on_the_next_connection(amqp_url: str) -> None:
    heard: list[str] = []

    async def announce() -> None:
        heard.append("here")

    async with BrokerConnection(broker_settings(amqp_url), "control") as connection, Peer(amqp_url) as peer:
        await StatusRequests(connection, announce).start()
        connection.reconnect("the test says so")
        await connection.channel()
        await ask(peer)
        await eventually(lambda: heard)
