# SPDX-License-Identifier: Apache-2.0
"""A connection that breaks in ways that nobody foresaw; the broker's part is in tests/integration."""

import asyncio
from typing import Any

import pytest

from acestep_consumer.broker import connection as module
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.config.settings import load
from tests.support.waiting import eventually


class BrokenConnection:
    """Opens, and fails to close with an error that is none of AMQP's."""

    opened = 0

    def __init__(self, *_: object, **__: object) -> None:
        self.transport = None

    async def connect(self, **_: object) -> None:
        BrokenConnection.opened += 1

    async def close(self) -> None:
        raise KeyError("nobody foresaw this")


class OpenChannel:
    """A channel that stays open."""

    def __init__(self) -> None:
        self.is_closed = False
        self.closing: asyncio.Future[object] = asyncio.get_running_loop().create_future()


async def test_an_unforeseen_error_while_closing_does_not_end_the_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    async def set_up(_self: BrokerConnection, _connection: Any) -> Any:
        return OpenChannel()

    monkeypatch.setattr(module, "NumberedConnection", BrokenConnection)
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(BrokerConnection, "_set_up", set_up)
    BrokenConnection.opened = 0
    async with BrokerConnection(load({}, None).broker, "test") as connection:
        for times in (2, 3):
            connection.reconnect("it is time")
            await eventually(lambda: BrokenConnection.opened == times and connection.is_up)  # noqa: B023 - awaited at once


async def test_a_reconnect_that_is_asked_for_during_the_set_up_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker may cancel a consumer before the last step of the set-up is done."""

    async def set_up(self: BrokerConnection, _connection: Any) -> Any:
        if BrokenConnection.opened == 1:
            self.reconnect("the broker cancelled the consumer")
        return OpenChannel()

    monkeypatch.setattr(module, "NumberedConnection", BrokenConnection)
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(BrokerConnection, "_set_up", set_up)
    BrokenConnection.opened = 0
    async with BrokerConnection(load({}, None).broker, "test") as connection:
        await eventually(lambda: BrokenConnection.opened == 2 and connection.is_up)
