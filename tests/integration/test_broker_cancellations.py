# SPDX-License-Identifier: Apache-2.0
"""Cancellations on a real broker: known at once, before the start, after a reconnect, whatever strangers do."""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest
from pamqp.header import ContentHeader

from acestep_consumer.broker import cancellations as module
from acestep_consumer.broker.cancellations import CancellationLog
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.topology import CONTROL, CONTROL_LOG
from infra.local.rabbitmq import RabbitMQ
from tests.support.broker import Peer, broker_settings, until
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

NOW = datetime.now(UTC).replace(microsecond=0)
SECOND = timedelta(seconds=1)
HOSTILE_KEYS = (
    "cancel.",
    "cancel.ä",
    "cancel.a b",
    f"cancel.{'x' * 240}",
    "cancel.#",
    "cancel.*",
    "sync.",
    "sync.none",
)
HOSTILE_PROPERTIES: tuple[dict[str, Any], ...] = (
    {"headers": {"x-stream-offset": "first", "x-death": [{"count": 1}], "deep": {"a": {"b": [1, None, True, 2.5]}}}},
    {"headers": {"n" * 120: "v" * 100_000, "bytes": bytearray(b"\xff\x00")}},
    {"message_id": "é" * 100, "correlation_id": "c" * 200, "reply_to": "amq.rabbitmq.reply-to.x", "priority": 200},
    {"expiration": 0, "content_type": "application/json", "type": "t"},
)
# As they stand in the frame: no client library writes these.
RAW_PROPERTIES = (
    struct.pack(">H", 1 << 7) + b"\x04caf\xe9",  # a message_id in Latin-1
    struct.pack(">HQ", 1 << 6, 1_700_000_000_000_000),  # a timestamp in microseconds
    struct.pack(">HI", 1 << 13, 9) + b"\x02\xff\xfeS\x00\x00\x00\x01a",  # a header whose name is no text
    struct.pack(">HI", 1 << 13, 11) + b"\x01kT" + b"\xff" * 8,  # a header that is a time beyond all calendars
)


async def cancel(peer: Peer, task_id: str, body: bytes = b"", **properties: Any) -> None:
    """Publish as any AMQP client does."""
    await publish(peer, f"cancel.{task_id}", body, **properties)


async def publish(peer: Peer, key: str, body: bytes = b"", **properties: Any) -> None:
    exchange = await peer.channel.get_exchange(CONTROL, ensure=False)
    await exchange.publish(aio_pika.Message(body, **properties), key, timeout=10)


def with_properties(odd: bytes) -> Callable[[ContentHeader], bytes]:
    """What writes a header's frame with these properties in place of its own."""
    return lambda header: struct.pack(">HHQ", 60, 0, header.body_size) + odd


@asynccontextmanager
async def following(url: str) -> AsyncIterator[tuple[CancellationLog, BrokerConnection]]:
    """A worker's part that hears cancellations, started."""
    async with BrokerConnection(broker_settings(url), "control") as connection:
        known = CancellationLog(connection)
        await asyncio.wait_for(known.start(), 20)
        yield known, connection
        await known.stop()


async def declare(url: str) -> None:
    async with BrokerConnection(broker_settings(url), "topology"):
        pass


@pytest.mark.broker_versions
async def test_what_was_cancelled_without_any_worker_is_known_when_the_start_returns(amqp_url: str) -> None:
    await declare(amqp_url)
    async with Peer(amqp_url) as peer:
        await cancel(peer, "t1", timestamp=NOW)
    async with following(amqp_url) as (known, _):
        assert known.is_cancelled("t1", NOW)
        assert not known.is_cancelled("t2", NOW)
    async with following(amqp_url) as (again, _):
        assert again.is_cancelled("t1", NOW)


async def test_a_cancellation_reaches_every_worker_at_once(amqp_url: str) -> None:
    async with following(amqp_url) as (one, _), following(amqp_url) as (other, _), Peer(amqp_url) as peer:
        waiting = [asyncio.create_task(known.wait("t1", NOW)) for known in (one, other)]
        await cancel(peer, "t2", timestamp=NOW)
        await eventually(lambda: one.is_cancelled("t2", NOW) and other.is_cancelled("t2", NOW))
        assert not any(task.done() for task in waiting)
        await cancel(peer, "t1", timestamp=NOW)
        await asyncio.wait_for(asyncio.gather(*waiting), 10)


async def test_what_was_cancelled_while_the_connection_was_down_is_known_when_it_is_up(amqp_url: str) -> None:
    async with (
        Proxy.for_url(amqp_url) as proxy,
        following(proxy.url(amqp_url)) as (known, connection),
        Peer(amqp_url) as peer,
    ):
        await cancel(peer, "before", timestamp=NOW)
        await eventually(lambda: known.is_cancelled("before", NOW))
        waiting = asyncio.create_task(known.wait("t1", NOW))
        proxy.refuse()
        await eventually(lambda: not connection.is_up)
        await cancel(peer, "t1", timestamp=NOW)
        proxy.heal()
        await connection.channel()
        assert known.is_cancelled("t1", NOW)
        assert known.is_cancelled("before", NOW)
        await asyncio.wait_for(waiting, 10)


async def test_a_cut_while_the_past_is_read_does_not_end_the_start(amqp_url: str) -> None:
    await declare(amqp_url)
    async with Peer(amqp_url) as peer:
        await asyncio.gather(*(cancel(peer, f"t{number}", timestamp=NOW) for number in range(500)))
    async with (
        Proxy.for_url(amqp_url) as proxy,
        BrokerConnection(broker_settings(proxy.url(amqp_url)), "control") as connection,
    ):
        known = CancellationLog(connection)
        proxy.drop_after(30_000)
        await asyncio.wait_for(known.start(), 20)
        assert proxy.accepted == 2
        assert all(known.is_cancelled(f"t{number}", NOW) for number in range(500))


async def test_an_id_can_be_used_again_after_its_cancellation(amqp_url: str) -> None:
    async with following(amqp_url) as (known, _), Peer(amqp_url) as peer:
        await cancel(peer, "t1", timestamp=NOW)
        await eventually(lambda: known.is_cancelled("t1", NOW - SECOND))
        assert known.is_cancelled("t1", NOW)
        assert not known.is_cancelled("t1", NOW + SECOND)
    async with following(amqp_url) as (known, _):
        assert not known.is_cancelled("t1", NOW + SECOND)


async def test_nothing_that_strangers_write_breaks_or_blocks_a_worker(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with following(amqp_url) as (live, connection), Peer(amqp_url) as peer:
        channel = await connection.channel()
        for key in HOSTILE_KEYS:
            await publish(peer, key, b"\xff{" * 1_000)
        for properties in HOSTILE_PROPERTIES:
            await cancel(peer, "t1", b"[" * 1_000_000, **properties)
        for number, odd in enumerate(RAW_PROPERTIES):
            with monkeypatch.context() as raw:
                raw.setattr(ContentHeader, "marshal", with_properties(odd))
                await cancel(peer, f"raw{number}")
        await cancel(peer, "t2", timestamp=NOW)
        await asyncio.wait_for(live.wait("t2", NOW), 20)
        assert await connection.channel() is channel
        async with following(amqp_url) as (late, _):
            assert late.is_cancelled("t1", None)
            assert late.is_cancelled("t2", NOW)
            assert set(late._known) == {"t1", "t2", "raw0", "raw1", "raw2", "raw3"}


async def test_what_no_worker_could_mean_is_returned_to_its_sender(amqp_url: str) -> None:
    await declare(amqp_url)
    async with Peer(amqp_url) as peer:
        for key in ("cancel.a.b", "cancel", "stop.t1"):
            with pytest.raises(aio_pika.exceptions.PublishError):
                await publish(peer, key)


async def test_ten_thousand_cancellations_delay_a_start_by_seconds(amqp_url: str) -> None:
    await declare(amqp_url)
    async with Peer(amqp_url) as peer:
        for first in range(0, 10_000, 500):
            await asyncio.gather(*(cancel(peer, f"t{number}", timestamp=NOW) for number in range(first, first + 500)))
    async with following(amqp_url) as (known, _):
        assert len(known._known) == 10_000
        assert known.is_cancelled("t0", NOW)
        assert known.is_cancelled("t9999", NOW)


@pytest.mark.broker_versions
async def test_a_stream_that_somebody_deletes_is_declared_and_followed_again(amqp_url: str) -> None:
    async with following(amqp_url) as (known, connection), Peer(amqp_url) as peer:
        channel = await connection.channel()
        await peer.channel.queue_delete(CONTROL_LOG)
        await eventually(lambda: connection.is_up and connection._channel is not channel)
        await cancel(peer, "t1", timestamp=NOW)
        await asyncio.wait_for(known.wait("t1", NOW), 10)


async def test_a_reading_that_does_not_end_is_begun_anew(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CATCH_UP_TIMEOUT_S", 0.2)
    await declare(amqp_url)
    async with Peer(amqp_url) as peer:
        await cancel(peer, "t1", b"x" * 1_000_000, timestamp=NOW)
    async with (
        Proxy.for_url(amqp_url) as proxy,
        BrokerConnection(broker_settings(proxy.url(amqp_url)), "control") as connection,
    ):
        known = CancellationLog(connection)
        proxy.slow(500_000)
        starting = asyncio.create_task(known.start())
        await eventually(lambda: proxy.accepted > 1)
        assert not starting.done()
        monkeypatch.undo()
        proxy.heal()
        await asyncio.wait_for(starting, 20)
        assert known.is_cancelled("t1", NOW)


@pytest.mark.broker_versions
async def test_the_connection_tells_the_brokers_version(amqp_url: str, rabbitmq: RabbitMQ) -> None:
    async with BrokerConnection(broker_settings(amqp_url), "worker") as connection:
        listed = await asyncio.to_thread(rabbitmq.ctl, "version")
        assert connection.server_version
        assert connection.server_version in listed


class WithoutStreams(RabbitMQ):
    """A broker that was upgraded from before streams, and whose operator has not enabled them."""

    def _environment(self) -> dict[str, str]:
        return super()._environment() | {"RABBITMQ_FEATURE_FLAGS": "quorum_queue,implicit_default_bindings"}


@pytest.fixture
def without_streams(tmp_path: Path) -> Iterator[RabbitMQ]:
    with WithoutStreams(tmp_path / "rabbitmq") as broker:
        yield broker


async def test_a_broker_without_streams_is_an_error_that_names_the_command(without_streams: RabbitMQ) -> None:
    flags = await asyncio.to_thread(without_streams.ctl, "list_feature_flags")
    if "stream_queue\tdisabled" not in flags:
        pytest.skip("this RabbitMQ always has streams")
    with pytest.raises(BrokerRefused, match="rabbitmqctl enable_feature_flag stream_queue"):
        await declare(without_streams.amqp_url)
    await asyncio.to_thread(without_streams.ctl, "enable_feature_flag", "stream_queue")
    async with following(without_streams.amqp_url) as (known, _):
        assert not known.is_cancelled("t1", None)


async def test_cancellations_outlive_a_restart_of_the_broker(own_rabbitmq: RabbitMQ) -> None:
    await declare(own_rabbitmq.amqp_url)
    async with Peer(own_rabbitmq.amqp_url) as peer:
        await cancel(peer, "t1", timestamp=NOW)
    await asyncio.to_thread(own_rabbitmq.restart)
    async with following(own_rabbitmq.amqp_url) as (known, connection):
        assert known.is_cancelled("t1", NOW)
        channel = await connection.channel()
        await asyncio.to_thread(own_rabbitmq.restart)
        await eventually(lambda: connection.is_up and connection._channel is not channel)
        assert known.is_cancelled("t1", NOW)

        async def heard() -> bool:
            return known.is_cancelled("t2", NOW)

        async with Peer(own_rabbitmq.amqp_url) as peer:
            await cancel(peer, "t2", timestamp=NOW)
        await until(heard, "the cancellation after the restart")
