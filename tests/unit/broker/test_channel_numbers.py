# SPDX-License-Identifier: Apache-2.0
"""The number of a closed channel is the last one to be used again."""

from types import SimpleNamespace
from typing import Any

import pytest
from yarl import URL

from acestep_consumer.broker.channel_numbers import NumberedConnection, connect


async def numbered(taken: set[int], channel_max: int) -> NumberedConnection:
    connection = NumberedConnection(URL("amqp://localhost"))
    opened = SimpleNamespace(channels=dict.fromkeys(taken), connection_tune=SimpleNamespace(channel_max=channel_max))
    transport: Any = SimpleNamespace(connection=opened, is_closed=True)
    connection.transport = transport
    return connection


def numbers(connection: NumberedConnection, count: int) -> list[int | None]:
    channels: list[Any] = [connection.channel() for _ in range(count)]
    return [channel._channel_number for channel in channels]


async def test_numbers_go_up_past_those_in_use_and_begin_anew_after_the_brokers_highest() -> None:
    connection = await numbered(taken={1, 3}, channel_max=5)
    assert numbers(connection, 6) == [2, 4, 5, 2, 4, 5]


async def test_a_broker_without_a_highest_number_is_given_its_default() -> None:
    connection = await numbered(taken=set(), channel_max=0)
    assert numbers(connection, 2048)[-2:] == [2047, 1]


async def test_with_all_numbers_in_use_the_library_decides() -> None:
    connection = await numbered(taken={1, 2}, channel_max=2)
    assert numbers(connection, 1) == [None]


async def test_a_number_that_the_caller_chose_stays() -> None:
    connection = await numbered(taken=set(), channel_max=0)
    chosen: Any = connection.channel(7)
    assert chosen._channel_number == 7


async def test_a_connection_that_cannot_be_opened_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[NumberedConnection] = []

    async def refused(connection: NumberedConnection, **_: object) -> None:
        made.append(connection)
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(NumberedConnection, "connect", refused)
    with pytest.raises(ConnectionRefusedError):
        await connect("amqp://localhost", "a", 1)
    assert [connection.is_closed for connection in made] == [True]
