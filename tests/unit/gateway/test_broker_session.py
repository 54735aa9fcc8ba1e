# SPDX-License-Identifier: Apache-2.0
"""The session with the broker over its outages."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from acestep_consumer.client import NoQueue, Unreachable
from acestep_consumer.gateway import broker_session
from acestep_consumer.gateway.broker_session import BrokerSession
from acestep_schemas.events import JobEvent, WorkerEvent
from tests.support.gateway import FakeRequestClient, completed
from tests.support.waiting import eventually


async def test_it_connects_as_soon_as_it_can_and_counts_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_session, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(broker_session, "POLL_S", 0.01)
    client, tries = FakeRequestClient(), 0
    received: list[str] = []

    def receive(event: JobEvent | WorkerEvent) -> None:
        if event.subject == "broken":
            raise KeyError(event.subject)
        received.append(event.subject)

    @asynccontextmanager
    async def connect() -> AsyncIterator[FakeRequestClient]:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise (NoQueue if tries == 1 else Unreachable)("not now")
        yield client

    session = BrokerSession(connect, receive)
    running = asyncio.create_task(session.run())
    with pytest.raises(Unreachable):
        await session.submit({"task_id": "a"})
    await eventually(lambda: session.is_up)
    client.ready = 4
    await eventually(lambda: session.queue_size == 4)
    await session.submit({"task_id": "a"})
    assert session.queue_size in (4, 5)  # until the broker is asked again
    for name in ("broken", "a"):
        client.events.put_nowait(completed(name))
    await eventually(lambda: received == ["a"])
    running.cancel()
    await asyncio.wait({running})
    assert not session.is_up


async def test_requests_of_the_first_moments_wait_for_the_connection() -> None:
    client, reached = FakeRequestClient(), asyncio.Event()

    @asynccontextmanager
    async def connect() -> AsyncIterator[FakeRequestClient]:
        await reached.wait()
        yield client

    session = BrokerSession(connect, lambda _: None)
    running = asyncio.create_task(session.run())
    early = asyncio.create_task(session.submit({"task_id": "a"}))
    stopped = asyncio.create_task(session.cancel("b"))
    await asyncio.sleep(0)
    reached.set()
    await early
    await stopped
    assert [request["task_id"] for request in client.published] == ["a"]
    assert client.cancelled == ["b"]
    running.cancel()
    await asyncio.wait({running})


async def test_they_do_not_wait_longer_than_a_client_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_session, "PATIENCE_S", 0.05)

    @asynccontextmanager
    async def connect() -> AsyncIterator[FakeRequestClient]:
        await asyncio.Event().wait()
        yield FakeRequestClient()

    session = BrokerSession(connect, lambda _: None)
    running = asyncio.create_task(session.run())
    with pytest.raises(Unreachable):
        await session.submit({"task_id": "a"})
    running.cancel()
    await asyncio.wait({running})


async def test_a_queue_that_cannot_be_asked_is_not_ready_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_session, "POLL_S", 0.01)

    class _Away(FakeRequestClient):
        away = True

        async def waiting(self) -> int | None:
            if self.away:
                raise Unreachable("away")
            return None

        async def request_statuses(self) -> None:
            raise Unreachable("this login may not ask")

    client = _Away()

    @asynccontextmanager
    async def connect() -> AsyncIterator[FakeRequestClient]:
        yield client

    session = BrokerSession(connect, lambda _: None)
    running = asyncio.create_task(session.run())
    await eventually(lambda: session._client is not None and not session.is_up)
    client.away = False
    await eventually(lambda: session.is_up)
    assert session.queue_size == 0
    running.cancel()
    await asyncio.wait({running})
