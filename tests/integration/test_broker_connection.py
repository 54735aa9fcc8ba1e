# SPDX-License-Identifier: Apache-2.0
"""A connection to a real broker, refused, late, cut, closed or stalled: it logs that, and recovers everything."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import BrokerError, BrokerRefused, ConnectionLost, mapped
from acestep_consumer.broker.topology import GENERATE
from infra.local.ports import PortClaim
from tests.support.broker import Peer, broker_settings
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from aiormq.channel import Channel
    from structlog.typing import EventDict

    from infra.local.rabbitmq import RabbitMQ


async def break_channel(connection: BrokerConnection) -> None:
    """Do what the broker closes a channel for: publish to an exchange that is not there."""
    channel = await connection.channel()
    with pytest.raises(BrokerError), mapped():
        await channel.basic_publish(b"", exchange="nowhere")


async def test_a_wrong_password_is_an_error_at_once_that_does_not_repeat_it(amqp_url: str) -> None:
    url = amqp_url.replace("guest:guest@", "guest:sesame@")
    with capture_logs() as logs, pytest.raises(BrokerRefused, match="check the user and the password") as refused:
        async with BrokerConnection(broker_settings(url), "worker"):
            pass
    assert "sesame" not in f"{refused.value!r} {logs}"


async def test_a_missing_virtual_host_is_an_error_at_once(amqp_url: str) -> None:
    with pytest.raises(BrokerRefused, match="does not open the virtual host"):
        async with BrokerConnection(broker_settings(f"{amqp_url}-gone"), "worker"):
            pass


async def test_a_worker_that_starts_before_its_broker_waits_and_says_so(amqp_url: str) -> None:
    claim = PortClaim(1)
    proxy = Proxy.for_url(amqp_url, listen_port=claim.ports[0])
    with capture_logs() as logs:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(start_late(proxy, logs))
            async with BrokerConnection(broker_settings(proxy.url(amqp_url)), "worker") as connection:
                assert connection.is_up
    claim.release()
    waiting = [entry for entry in logs if "wait_s" in entry]
    assert len(waiting) >= 2
    assert all("Connect call failed" in entry["reason"] for entry in waiting)
    # It tries every few seconds, for hours if need be: the same reason is news once a minute.
    assert [entry["log_level"] for entry in waiting] == ["warning"] + ["debug"] * (len(waiting) - 1)
    assert "guest" not in str(logs)


async def start_late(proxy: Proxy, logs: list[EventDict]) -> None:
    await eventually(lambda: len(logs) >= 2)
    async with proxy:
        await eventually(lambda: logs[-1]["event"] == "broker connected")
        await eventually(lambda: proxy.open == 0)


async def test_the_broker_lists_the_connection_by_its_name(amqp_url: str, amqp_vhost: str, rabbitmq: RabbitMQ) -> None:
    async with BrokerConnection(broker_settings(amqp_url), "acestep-consumer w1 consume"):
        listed = await asyncio.to_thread(rabbitmq.ctl, "list_connections", "vhost", "client_properties")
    (line,) = (line for line in listed.splitlines() if amqp_vhost in line)
    assert "acestep-consumer w1 consume" in line


async def test_the_connection_comes_back_after_a_cut_a_channel_error_and_an_operator(
    amqp_url: str, amqp_vhost: str, rabbitmq: RabbitMQ
) -> None:
    channels: list[Channel] = []

    async def step(channel: Channel) -> None:
        channels.append(channel)

    async with (
        Proxy.for_url(amqp_url) as proxy,
        BrokerConnection(broker_settings(proxy.url(amqp_url)), "worker") as connection,
    ):
        await connection.attach(step)

        proxy.cut()
        await eventually(lambda: connection.is_up and len(channels) == 2)

        await break_channel(connection)
        await eventually(lambda: connection.is_up and len(channels) == 3)

        await asyncio.to_thread(rabbitmq.ctl, "close_all_connections", "--vhost", amqp_vhost, "an operator's reason")
        await eventually(lambda: connection.is_up and len(channels) == 4)

        assert await connection.channel() is channels[-1]
        assert all(channel.is_closed for channel in channels[:-1])


async def test_of_a_cluster_it_takes_the_node_that_answers_and_comes_back_to_another_one(amqp_url: str) -> None:
    async with Proxy.for_url(amqp_url) as one, Proxy.for_url(amqp_url) as two, Proxy.for_url(amqp_url) as three:
        one.refuse()
        nodes = [proxy.url(amqp_url) for proxy in (one, two, three)]
        with capture_logs() as logs:
            async with BrokerConnection(broker_settings(",".join(nodes)), "worker") as connection:
                assert (two.open, three.open) == (1, 0)
                two.refuse()
                await eventually(lambda: connection.is_up and three.open == 1)
    named = [entry["broker"].rpartition(":")[2].partition("/")[0] for entry in logs if "broker" in entry]
    assert named == [str(proxy.port) for proxy in (one, two, three)]
    assert "guest" not in str(logs)


async def test_a_channel_on_which_publishes_are_refused_is_renewed_once_it_is_not_new(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with BrokerConnection(broker_settings(amqp_url), "worker") as connection:
        first = await connection.channel()
        connection.publish_refused()
        assert await connection.channel() is first
        monkeypatch.setattr("acestep_consumer.broker.connection.RECONNECT_INTERVAL_S", 0.0)
        connection.publish_refused()
        assert await connection.channel() is not first


async def test_a_channel_that_opens_while_another_is_refused_costs_no_connection(
    amqp_url: str, close_received: asyncio.Event
) -> None:
    async with BrokerConnection(broker_settings(amqp_url), "worker") as connection:
        first = await connection.channel()
        refused = asyncio.create_task(connection.ensure_queue("nowhere"))
        await close_received.wait()
        await connection.ensure_queue(GENERATE)
        await refused
        assert await connection.channel() is first


async def test_what_was_deleted_while_the_connection_was_down_is_declared_again(amqp_url: str) -> None:
    async with (
        Peer(amqp_url) as operator,
        Proxy.for_url(amqp_url) as proxy,
        BrokerConnection(broker_settings(proxy.url(amqp_url)), "worker") as connection,
    ):
        proxy.refuse()
        await eventually(lambda: not connection.is_up)
        await operator.channel.queue_delete(GENERATE)
        proxy.heal()
        await connection.channel()
        assert await operator.ready(GENERATE) == 0


async def test_a_peer_that_falls_silent_is_given_up_after_its_heartbeats(amqp_url: str) -> None:
    async with Proxy.for_url(amqp_url) as proxy:
        url = f"{proxy.url(amqp_url)}?heartbeat=1"
        async with BrokerConnection(broker_settings(url), "worker") as connection:
            proxy.stall()
            await eventually(lambda: not connection.is_up)
            proxy.heal()
            await eventually(lambda: connection.is_up)


async def test_a_slow_connection_is_slow_and_not_lost(amqp_url: str) -> None:
    async with Proxy.for_url(amqp_url) as proxy:
        proxy.slow(20_000)
        async with BrokerConnection(broker_settings(proxy.url(amqp_url)), "worker") as connection:
            assert connection.is_up
        assert proxy.accepted == 1


async def test_a_connection_that_dies_within_the_handshake_is_tried_again(amqp_url: str) -> None:
    async with Proxy.for_url(amqp_url) as proxy:
        for dropped_after in (3, 100, 700, 1_500):
            proxy.drop_after(dropped_after)
            async with BrokerConnection(broker_settings(proxy.url(amqp_url)), "worker") as connection:
                assert connection.is_up
        assert proxy.accepted == 8


async def test_a_step_that_the_broker_refuses_is_an_error_and_leaves_the_connection_usable(amqp_url: str) -> None:
    async def step(channel: Channel) -> None:
        with mapped():
            await channel.queue_declare(GENERATE, durable=True, arguments={"x-max-length": 1})

    async with BrokerConnection(broker_settings(amqp_url), "worker") as connection:
        with pytest.raises(BrokerRefused, match="other settings"):
            await connection.attach(step)
        await connection.channel()
        assert connection.is_up


async def test_a_step_that_loses_the_connection_is_done_on_the_next(amqp_url: str) -> None:
    tries = 0

    async def step(channel: Channel) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ConnectionLost("once")

    async with BrokerConnection(broker_settings(amqp_url), "worker") as connection:
        await connection.attach(step)
        await eventually(lambda: tries == 2 and connection.is_up)
