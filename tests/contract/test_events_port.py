# SPDX-License-Identifier: Apache-2.0
"""What the story may expect of `Events`, held by the fake and by the publisher on a real broker."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

from acestep_consumer.broker import publisher as publisher_module
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.domain.errors import Unpublished
from acestep_consumer.domain.ports import Reply
from acestep_schemas.events import parse_event
from tests.support.broker import Peer, broker_settings, failed_event, progress_event
from tests.support.fakes import FakeEvents
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from acestep_consumer.domain import ports
    from acestep_schemas.events import JobEvent, WorkerEvent

REPLY_TO = "answers"


class EventsUnderTest(Protocol):
    """The port, and the subscribers' side of it."""

    @property
    def events(self) -> ports.Events: ...

    async def heard(self) -> list[tuple[JobEvent | WorkerEvent, str | None]]:
        """Each event that came through the exchange, with its correlation id."""

    async def answered(self) -> list[JobEvent | WorkerEvent]:
        """Each event that came to the reply queue."""

    async def go_down(self) -> None:
        """Nothing is confirmed from now on."""


class Fake:
    def __init__(self) -> None:
        self.events = FakeEvents()

    async def heard(self) -> list[tuple[JobEvent | WorkerEvent, str | None]]:
        return [(event, reply.correlation_id) for event, reply in self.events.published]

    async def answered(self) -> list[JobEvent | WorkerEvent]:
        return [event for queue, event in self.events.answers if queue == REPLY_TO]

    async def go_down(self) -> None:
        self.events.down = True


class Real:
    def __init__(
        self, events: Publisher, peer: Peer, proxy: Proxy, queue: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.events = events
        self._peer, self._proxy, self._queue, self._monkeypatch = peer, proxy, queue, monkeypatch

    async def heard(self) -> list[tuple[JobEvent | WorkerEvent, str | None]]:
        count = await self._peer.ready(self._queue)
        messages = [await self._peer.take(self._queue) for _ in range(count)]
        return [(parse_event(message.body), message.correlation_id) for message in messages]

    async def answered(self) -> list[JobEvent | WorkerEvent]:
        count = await self._peer.ready(REPLY_TO)
        return [parse_event((await self._peer.take(REPLY_TO)).body) for _ in range(count)]

    async def go_down(self) -> None:
        self._monkeypatch.setattr(publisher_module, "PATIENCE_S", 1.0)
        self._proxy.refuse()


@pytest.fixture(params=["fake", "real"])
async def under_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EventsUnderTest]:
    if request.param == "fake":
        yield Fake()
        return
    url = request.getfixturevalue("amqp_url")
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy.for_url(url))
        connection = await stack.enter_async_context(BrokerConnection(broker_settings(proxy.url(url)), "publish"))
        peer = await stack.enter_async_context(Peer(url))
        await peer.channel.declare_queue(REPLY_TO, exclusive=True)
        yield Real(Publisher(connection, "w1"), peer, proxy, await peer.subscribe("job.#"), monkeypatch)


class TestEvents:
    async def test_events_are_heard_in_order_with_the_correlation_id(self, under_test: EventsUnderTest) -> None:
        reply = Reply(reply_to=None, correlation_id="c1")
        sent: list[JobEvent] = [progress_event("t1", 1), progress_event("t1", 2), failed_event("t1")]
        for event in sent:
            await under_test.events.publish(event, reply)
        assert await under_test.heard() == [(event, "c1") for event in sent]

    async def test_the_terminal_event_alone_is_answered_to_reply_to(self, under_test: EventsUnderTest) -> None:
        reply = Reply(reply_to=REPLY_TO, correlation_id=None)
        end = failed_event("t1")
        await under_test.events.publish(progress_event("t1", 1), reply)
        await under_test.events.publish(end, reply)
        assert await under_test.answered() == [end]

    async def test_an_event_can_be_published_again(self, under_test: EventsUnderTest) -> None:
        reply = Reply()
        event = failed_event("t1")
        await under_test.events.publish(event, reply)
        await under_test.events.publish(event, reply)
        assert await under_test.heard() == [(event, None), (event, None)]

    async def test_what_is_not_confirmed_raises_unpublished(self, under_test: EventsUnderTest) -> None:
        await under_test.go_down()
        with pytest.raises(Unpublished, match=r"job\.failed\.t1"):
            await under_test.events.publish(failed_event("t1"), Reply())
