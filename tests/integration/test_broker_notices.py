# SPDX-License-Identifier: Apache-2.0
"""Notices on a real broker: what it gave up itself is told once, what a worker gave up is not told again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest
from pamqp.commands import Basic

from acestep_consumer.broker import dead_letter_notices as module
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.dead_letter import CODE
from acestep_consumer.broker.dead_letter_notices import DeadLetterNotice, DeadLetterNotices
from acestep_consumer.broker.delivery import fingerprint
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE, NOTICES
from acestep_consumer.domain.errors import RenderFailed
from acestep_consumer.domain.ports import Reply
from tests.support.broker import Peer, broker_settings, until
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NOW = datetime.now(UTC).replace(microsecond=0)
KINDS = pytest.mark.parametrize("queue_type", ["classic", "quorum"])


class NoticeRecorder:
    """Hears notices; leaves them unacknowledged, or refuses them, while the test wants that."""

    def __init__(self, refusals: int = 0) -> None:
        self.notices: list[DeadLetterNotice] = []
        self.calls = 0
        self.go = asyncio.Event()
        self.go.set()
        self._refusals = refusals

    async def tell(self, notice: DeadLetterNotice) -> None:
        self.calls += 1
        await self.go.wait()
        if self.calls <= self._refusals:
            raise RuntimeError("nobody could be told")
        self.notices.append(notice)

    @property
    def bodies(self) -> list[bytes]:
        return [notice.body for notice in self.notices]


@asynccontextmanager
async def telling(url: str, recorder: NoticeRecorder, **values: Any) -> AsyncIterator[BrokerConnection]:
    """A worker's part that hears notices, started."""
    settings = broker_settings(url, **values)
    async with BrokerConnection(settings, "control") as connection:
        notices = DeadLetterNotices(connection, settings, recorder.tell)
        await notices.start()
        yield connection
        await notices.stop()


async def unsettled(url: str) -> int:
    """How many notices there are once none is unacknowledged: what was acked is gone."""
    async with Peer(url) as peer:
        return await peer.ready(NOTICES)


async def expire(peer: Peer, body: bytes, **properties: Any) -> None:
    await peer.request(body, expiration=0.01, **properties)


async def is_dead(url: str, count: int) -> None:
    """Wait until so many dead letters are there for people."""
    async with Peer(url) as peer:

        async def arrived() -> bool:
            return await peer.ready(DEAD_LETTER) == count

        await until(arrived, "the dead letters")


@pytest.mark.broker_versions
@KINDS
async def test_a_request_that_expires_in_the_queue_is_told_with_all_that_its_event_needs(
    amqp_url: str, queue_type: str
) -> None:
    recorder = NoticeRecorder()
    async with telling(amqp_url, recorder, queue_type=queue_type), Peer(amqp_url) as peer:
        await expire(peer, b"late", message_id="m1", reply_to="r1", correlation_id="c1", timestamp=NOW)
        await expire(peer, b"bare")
        await eventually(lambda: len(recorder.notices) == 2)
        full, bare = sorted(recorder.notices, key=lambda notice: notice.body, reverse=True)
        assert (full.body, full.message_id, full.reason) == (b"late", "m1", "expired")
        sent = Basic.Properties(message_id="m1", reply_to="r1", correlation_id="c1", timestamp=NOW, expiration="10")
        assert full.fingerprint == fingerprint(b"late", sent), "as of a delivery"
        assert full.reply == Reply("r1", "c1")
        assert full.at is not None
        assert abs((full.at - datetime.now(UTC)).total_seconds()) < 300
        assert (bare.body, bare.reply) == (b"bare", Reply())
        named = Basic.Properties(message_id=bare.message_id, expiration="10")
        assert bare.fingerprint == fingerprint(b"bare", named)
        assert await peer.ready(DEAD_LETTER) == 2
    assert await unsettled(amqp_url) == 0


@KINDS
async def test_what_expired_without_any_worker_is_told_by_the_next_one(amqp_url: str, queue_type: str) -> None:
    async with BrokerConnection(broker_settings(amqp_url, queue_type=queue_type), "topology"), Peer(amqp_url) as peer:
        for number in range(20):
            await expire(peer, b"%d" % number)
        await is_dead(amqp_url, 20)
    recorder = NoticeRecorder()
    async with telling(amqp_url, recorder, queue_type=queue_type):
        await eventually(lambda: len(recorder.notices) == 20)
    assert set(recorder.bodies) == {b"%d" % number for number in range(20)}
    assert await unsettled(amqp_url) == 0


@KINDS
async def test_what_a_worker_dead_lettered_is_let_go_in_silence(amqp_url: str, queue_type: str) -> None:
    recorder = NoticeRecorder()
    async with telling(amqp_url, recorder, queue_type=queue_type) as connection, Peer(amqp_url) as peer:
        forged: dict[str, Any] = {"x-death": [{"queue": GENERATE, "reason": "expired"}]}
        for headers in ({}, forged):
            properties = Basic.Properties(message_id="m1", headers=headers)
            await Publisher(connection, "w1").dead_letter(b"told", properties, RenderFailed("no sound"))
        await expire(peer, b"late")
        await eventually(lambda: recorder.bodies == [b"late"])
    assert recorder.calls == 1
    assert await unsettled(amqp_url) == 0


async def test_a_producer_who_writes_a_workers_header_hears_of_it_all_the_same(amqp_url: str) -> None:
    recorder = NoticeRecorder()
    async with telling(amqp_url, recorder), Peer(amqp_url) as peer:
        await expire(peer, b"late", headers={CODE: "render_failed", "x-death": "no list"})
        await eventually(lambda: recorder.bodies == [b"late"])
        assert recorder.notices[0].reason == "expired"


@pytest.mark.broker_versions
async def test_a_request_that_somebody_rejects_is_told_under_the_brokers_word(amqp_url: str) -> None:
    recorder = NoticeRecorder()
    async with telling(amqp_url, recorder), Peer(amqp_url) as peer:
        await peer.request(b"no")
        await (await peer.look(GENERATE)).reject(requeue=False)
        await eventually(lambda: [notice.reason for notice in recorder.notices] == ["rejected"])


async def test_what_never_was_a_request_is_left_alone(amqp_url: str) -> None:
    recorder = NoticeRecorder()
    async with telling(amqp_url, recorder), Peer(amqp_url) as peer:
        other = await peer.channel.declare_queue(exclusive=True, arguments={"x-dead-letter-exchange": DEAD_LETTER})
        queue = await peer.channel.get_queue(NOTICES, ensure=False)
        strange = Basic.Properties(headers={"x-death": [{"queue": 5}, None]})
        for key in (other.name, queue.name):
            await peer.channel.default_exchange.publish(aio_pika.Message(b"stranger"), key)
        await (await peer.look(other.name)).reject(requeue=False)
        underlay = await peer.channel.get_underlay_channel()
        await underlay.basic_publish(b"stranger", exchange=DEAD_LETTER, routing_key="x", properties=strange)
        await expire(peer, b"late")
        await eventually(lambda: recorder.bodies == [b"late"])
    assert recorder.calls == 1
    assert await unsettled(amqp_url) == 0


@KINDS
async def test_a_notice_that_could_not_be_told_comes_again(
    amqp_url: str, queue_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETURN_DELAY_S", 0.05)
    recorder = NoticeRecorder(refusals=3)
    async with telling(amqp_url, recorder, queue_type=queue_type) as connection, Peer(amqp_url) as peer:
        channel = await connection.channel()
        await expire(peer, b"late", message_id="m1")
        await eventually(lambda: recorder.bodies == [b"late"])
        assert (recorder.calls, recorder.notices[0].reason, recorder.notices[0].message_id) == (4, "expired", "m1")
        assert await connection.channel() is channel
    assert await unsettled(amqp_url) == 0


async def test_one_that_cannot_be_told_does_not_keep_others_waiting(amqp_url: str) -> None:
    recorder = NoticeRecorder(refusals=1)
    async with telling(amqp_url, recorder), Peer(amqp_url) as peer:
        for number in range(3):
            await expire(peer, b"%d" % number)
        await eventually(lambda: len(recorder.notices) == 3)
    assert recorder.bodies == [b"1", b"2", b"0"]


async def test_an_unacknowledged_notice_when_the_connection_is_cut_is_told_and_comes_again(amqp_url: str) -> None:
    recorder = NoticeRecorder()
    recorder.go.clear()
    async with (
        Proxy.for_url(amqp_url) as proxy,
        telling(proxy.url(amqp_url), recorder) as connection,
        Peer(amqp_url) as peer,
    ):
        await expire(peer, b"late")
        await eventually(lambda: recorder.calls == 1)
        proxy.cut()
        await eventually(lambda: recorder.calls == 2 and connection.is_up)
        recorder.go.set()
        await eventually(lambda: recorder.bodies == [b"late", b"late"])
    assert await unsettled(amqp_url) == 0


async def test_a_worker_that_stops_leaves_to_the_next_what_it_has_not_told(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.1)
    stuck, recorder = NoticeRecorder(), NoticeRecorder()
    stuck.go.clear()
    async with Peer(amqp_url) as peer:
        async with telling(amqp_url, stuck):
            await expire(peer, b"late")
            await eventually(lambda: stuck.calls == 1)
        async with telling(amqp_url, recorder):
            await eventually(lambda: recorder.bodies == [b"late"])
    assert not stuck.notices
    assert await unsettled(amqp_url) == 0


@pytest.mark.broker_versions
async def test_a_deleted_queue_is_made_again_and_followed(amqp_url: str) -> None:
    recorder = NoticeRecorder()
    async with telling(amqp_url, recorder) as connection, Peer(amqp_url) as peer:
        channel = await connection.channel()
        await peer.channel.queue_delete(NOTICES)
        await eventually(lambda: connection.is_up and connection._channel is not channel)
        await expire(peer, b"late")
        await eventually(lambda: recorder.bodies == [b"late"])
