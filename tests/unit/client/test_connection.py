# SPDX-License-Identifier: Apache-2.0
"""What a publish makes of lost connections and refusals; the broker's part is in tests/integration/test_client.py."""

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import aio_pika
import pytest

from acestep_consumer.broker.errors import BrokerError, BrokerRefused, ConnectionLost, Nacked, Unroutable
from acestep_consumer.client.connection import ClientConnection, ObjectNotFound
from acestep_consumer.client.errors import NoQueue, Unreachable

MESSAGE = aio_pika.Message(b"{}")


class Script:
    """Each publish ends as the next fault says; None is a confirm. ``connects`` does the same for opening a channel."""

    def __init__(self, *publishes: BrokerError | None, connects: tuple[BrokerError | None, ...] = ()) -> None:
        self._publishes = iter(publishes)
        self._connects = iter(connects)
        self.published = 0

    async def publisher(self) -> None:
        _raise(next(self._connects, None))

    async def publish(self, *_: object) -> None:
        self.published += 1
        _raise(next(self._publishes))


def _raise(fault: BrokerError | None) -> None:
    if fault is not None:
        raise fault


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(*_: float) -> Iterator[float]:
        while True:
            yield 0.0

    monkeypatch.setattr("acestep_consumer.client.connection.backoff", at_once)


async def publish(monkeypatch: pytest.MonkeyPatch, script: Script, patience_s: float = 5.0) -> Script:
    line = ClientConnection("amqp://nowhere/", patience_s)
    monkeypatch.setattr(line, "_publisher", script.publisher)
    monkeypatch.setattr("acestep_consumer.client.connection._publish", script.publish)
    await line.publish("e", "k", MESSAGE)
    return script


@pytest.mark.parametrize("url", ["amqp:host", "amqp://", "amqp:///sesame", "http://user:sesame@host", "sesame"])
def test_a_url_that_names_no_broker_is_explained_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="the URL must look like amqp://") as refused:
        ClientConnection(url, 5.0)
    assert "sesame" not in str(refused.value)


async def test_a_lost_connection_is_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ConnectionLost("gone")
    script = await publish(monkeypatch, Script(lost, lost, None, connects=(lost, None, lost)))
    assert script.published == 3


@pytest.mark.parametrize("fault", [Nacked("full"), Unroutable("nobody")])
async def test_a_refusal_is_the_callers_to_judge(monkeypatch: pytest.MonkeyPatch, fault: BrokerError) -> None:
    with pytest.raises(type(fault)):
        await publish(monkeypatch, Script(fault))


async def test_a_refusal_after_a_connection_that_was_lost_before_sending_is_still_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Nacked):
        await publish(monkeypatch, Script(Nacked("full"), connects=(ConnectionLost("gone"),)))


class Channel:
    """As much of a channel as is looked at."""

    is_closed = False

    async def close(self) -> None:
        self.is_closed = True


async def test_a_channel_that_was_refused_something_is_left_and_closed_when_nothing_waits_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits, answer = asyncio.Event(), asyncio.Event()

    async def scripted(_channel: object, exchange: str, *_: object) -> None:
        if exchange == "full":
            raise Nacked("full")
        waits.set()
        await answer.wait()

    monkeypatch.setattr("acestep_consumer.client.connection._publish", scripted)
    line, channel = ClientConnection("amqp://nowhere/", 5.0), cast("Any", Channel())
    line._publishing = channel
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(line.publish("slow", "k", MESSAGE))
        await waits.wait()
        with pytest.raises(Nacked):
            await line.publish("full", "k", MESSAGE)
        assert line._publishing is None
        assert not channel.is_closed
        answer.set()
    assert channel.is_closed


async def test_a_refusal_after_a_lost_confirm_does_not_claim_that_nothing_was_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Unreachable, match="sending the same task id again is safe"):
        await publish(monkeypatch, Script(ConnectionLost("gone"), Nacked("full")))


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (ObjectNotFound("no exchange"), NoQueue, "topology --declare"),
        (BrokerRefused("no permission"), Unreachable, "permis"),
    ],
)
async def test_what_another_try_would_not_change_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, fault: BrokerError, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        await publish(monkeypatch, Script(fault))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script(*[ConnectionLost("gone")] * 100_000), "gone.*sending the same task id again is safe"),
        (Script(connects=(ConnectionLost("gone"),) * 100_000), "gone.*nothing was sent"),
    ],
)
async def test_patience_ends_and_says_whether_anything_was_sent(
    monkeypatch: pytest.MonkeyPatch, script: Script, words: str
) -> None:
    with pytest.raises(Unreachable, match=words):
        await publish(monkeypatch, script, patience_s=0.05)


@pytest.mark.parametrize("url", ["amqp://user:ses#ame@host/", "amqp://user:12/ame@host/", "amqp://user:ses/ame@host/"])
def test_a_password_that_is_not_percent_encoded_is_explained_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="percent-encoded") as caught:
        ClientConnection(url, 5)
    assert "ame@" not in str(caught.value)
    assert "ses" not in str(caught.value)


def test_a_heartbeat_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="heartbeat in the URL must be a whole number of seconds"):
        ClientConnection("amqp://host/?heartbeat=soon", 5)


class _Confirming(Channel):
    """A channel that takes one publish at a time until the socket has it, and confirms when all have arrived."""

    def __init__(self, wanted: int) -> None:
        self._taking = asyncio.Lock()
        self._left = wanted
        self._all = asyncio.Event()

    async def get_underlay_channel(self) -> "_Confirming":
        return self

    async def basic_publish(self, _: bytes, *, wait: bool, **message: object) -> None:
        assert message["mandatory"]
        async with self._taking:
            self._left -= 1
            if not self._left:
                self._all.set()
            if wait:
                await self._all.wait()
        await self._all.wait()


async def test_publishes_wait_for_their_own_confirm_and_not_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    connection, channel = ClientConnection("amqp://localhost/", 2), _Confirming(200)

    async def publisher() -> _Confirming:
        return channel

    monkeypatch.setattr(connection, "_publisher", publisher)
    async with asyncio.timeout(5):
        await asyncio.gather(*(connection.publish("requests", "generate", MESSAGE) for _ in range(200)))
