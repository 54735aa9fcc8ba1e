# SPDX-License-Identifier: Apache-2.0
"""Reads the dead-letter queue for ``acestep-consumer dead``: each message is left, requeued or removed.

Messages are fetched without an ack and held until the end. Those that were neither requeued nor removed then return to
their places. The one trace is the flag ``redelivered`` (on a quorum queue a count), which nothing reads and no requeued
message carries. If this program dies, the broker returns all, on a quorum queue perhaps in another order. While
messages are held, another reader finds the queue empty; workers go on adding to it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

from aio_pika import exceptions as amqp
from pamqp.commands import Basic

from acestep_consumer.broker import lenient_codec
from acestep_consumer.broker.channel_numbers import connect
from acestep_consumer.broker.dead_letter import DeadLetterReason, death_of, format_of, requeued_properties
from acestep_consumer.broker.errors import (
    CHECK_BROKER,
    BrokerError,
    BrokerRefused,
    ConnectionLost,
    describe,
    end_within,
    mapped,
)
from acestep_consumer.broker.topology import DEAD_LETTER, REQUESTS, ROUTING_KEY
from acestep_consumer.domain.ports import BodyFormat

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aio_pika.abc import AbstractConnection
    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from acestep_consumer.config.settings import BrokerSettings

CONNECT_TIMEOUT_S = 10.0
_NAME = "acestep-consumer dead"
CALL_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead-lettered message that is held."""

    body: bytes
    properties: Basic.Properties
    death: DeadLetterReason
    tag: int

    @property
    def message_id(self) -> str | None:
        """AMQP ``message_id``, as the producer set it."""
        return self.properties.message_id or None

    @property
    def body_format(self) -> BodyFormat:
        """AMQP ``content_type`` and ``content_encoding``."""
        return format_of(self.properties)


class DeadLetterQueue:
    """The dead-letter queue of the broker in ``settings``. An async context manager.

    Nothing is declared: reading must not depend on how the queues were declared, nor change them.
    """

    def __init__(self, settings: BrokerSettings, at_most: int | None = None) -> None:
        """``at_most``: read this many messages, the oldest; None: all."""
        self._at_most = at_most
        self._urls = tuple(url.get_secret_value() for url in settings.urls)
        self._connection: AbstractConnection | None = None
        self._is_quorum = settings.queue_type == "quorum"
        self._count = 0
        self._taken = 0

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            BrokerRefused: login, virtual host, or there is no such queue.
            ConnectionLost: the broker is unreachable.
        """
        lenient_codec.install()
        self._connection = connection = await self._connect()
        try:
            await self._open(connection)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        with suppress(BrokerError), mapped():
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._put_back()
        await self._close()

    async def _connect(self) -> AbstractConnection:
        """Connect to the first node that answers."""
        *others, last = self._urls
        for url in others:
            with suppress(ConnectionLost), mapped():
                return await connect(url, _NAME, CONNECT_TIMEOUT_S)
        try:
            with mapped():
                return await connect(last, _NAME, CONNECT_TIMEOUT_S)
        except ConnectionLost as loss:
            raise ConnectionLost(f"no connection to the broker: {describe(loss)}; {CHECK_BROKER}") from loss

    @property
    def count(self) -> int:
        """Number of messages that waited when the queue was opened."""
        return self._count

    async def _put_back(self) -> None:
        """Return what was neither requeued nor removed, in its order.

        On a classic queue it would be enough to close the channel. A quorum queue appends returned messages, so all of
        them have to be fetched once to keep their order.
        """
        if self._is_quorum:
            while self._taken < self._count and (await self._get()).delivery_tag is not None:
                pass
        await self._channel.basic_nack(0, multiple=True, requeue=True)

    async def messages(self) -> AsyncGenerator[DeadLetter]:
        """Yield the messages that waited when the queue was opened, oldest first; later ones are left out."""
        for _ in range(self._count if self._at_most is None else min(self._count, self._at_most)):
            with mapped():
                message = await self._get()
            if message.delivery_tag is None:
                return
            properties = message.header.properties
            yield DeadLetter(message.body, properties, death_of(properties.headers or {}), message.delivery_tag)

    async def remove(self, message: DeadLetter) -> None:
        """Remove it from the queue for good. Raises ``ConnectionLost``."""
        with mapped():
            await self._channel.basic_ack(message.tag)

    async def requeue(self, message: DeadLetter) -> None:
        """Publish it as a request again, and remove it once the broker has confirmed that.

        In between it is in both queues: a crash leaves a copy, which the task id makes harmless.

        Raises:
            Nacked: the request queue is full; the message stays.
            Unroutable: the request queue is not declared; the message stays.
            ConnectionLost: the message stays, and may have been published as well.
        """
        with mapped():
            await self._channel.basic_publish(
                message.body,
                exchange=REQUESTS,
                routing_key=ROUTING_KEY,
                properties=requeued_properties(message.properties),
                mandatory=True,
                timeout=CALL_TIMEOUT_S,
            )
        await self.remove(message)

    async def _get(self) -> DeliveredMessage:
        self._taken += 1
        return await self._channel.basic_get(DEAD_LETTER, timeout=CALL_TIMEOUT_S)

    async def _open(self, connection: AbstractConnection) -> None:
        with mapped():
            opened = await connection.channel(publisher_confirms=True, on_return_raises=True)
            self._channel = cast("Channel", await opened.get_underlay_channel())
            try:
                found = await self._channel.queue_declare(DEAD_LETTER, passive=True, timeout=CALL_TIMEOUT_S)
            except amqp.ChannelNotFoundEntity as error:
                raise BrokerRefused(
                    f"there is no queue {DEAD_LETTER} yet: start a worker, or run `acestep-consumer topology --declare`"
                ) from error
        self._count = (found.message_count if found else None) or 0

    async def _close(self) -> None:
        if self._connection is not None:
            await end_within(CLOSE_TIMEOUT_S, self._connection.close())
