# SPDX-License-Identifier: Apache-2.0
"""Warns when two workers have the same id: events, logs and ``status`` cannot tell them apart.

It happens with a fixed ``ACESTEP_WORKER_ID``, and with the default one where containers share a host name, since each
has process number 1. Both go on working: nothing of the delivery guarantee rests on the id.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog
from pamqp.commands import Basic

from acestep_consumer.broker.errors import BrokerError, mapped
from acestep_consumer.broker.topology import CONTROL, RPC_TIMEOUT_S, SYNC, consume_own_queue

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel, DeliveredMessage
    from aiormq.channel import Channel

    from acestep_consumer.broker.connection import BrokerConnection

_QUESTION, _ANSWER = "question", "answer"

log = structlog.get_logger()


class DuplicateIdCheck:
    """Asks on ``connection`` whether another worker has the same id, and answers the same question of others.

    The routing key is ``sync.worker.<id>``: permissions of workers cover it, and the stream of cancellations, which is
    bound with ``sync.*``, does not get it.
    """

    def __init__(self, connection: BrokerConnection, worker_id: str) -> None:
        self._connection = connection
        self._worker_id = worker_id
        # Told apart by it: a worker hears its own questions too.
        self._instance = uuid4().hex
        self._warned: set[str] = set()

    async def start(self) -> None:
        """Ask and listen, on this channel and on every later one. Raises ``BrokerRefused``."""
        await self._connection.attach(self._set_up)

    async def stop(self) -> None:
        """Ask no more on later channels."""
        self._connection.detach(self._set_up)

    async def _set_up(self, channel: Channel) -> None:
        with mapped():
            queue = await consume_own_queue(channel, self._on_message)
            await channel.queue_bind(queue, CONTROL, self._key, timeout=RPC_TIMEOUT_S)
            await self._publish(channel, _QUESTION)

    @property
    def _key(self) -> str:
        return f"{SYNC}.worker.{self._worker_id}"

    async def _publish(self, channel: AbstractChannel, kind: str) -> None:
        properties = Basic.Properties(message_type=kind, correlation_id=self._instance)
        await channel.basic_publish(
            b"", exchange=CONTROL, routing_key=self._key, properties=properties, timeout=RPC_TIMEOUT_S
        )

    async def _on_message(self, message: DeliveredMessage) -> None:
        properties = message.header.properties
        other = properties.correlation_id
        if not other or other == self._instance:
            return
        if other not in self._warned:
            self._warned.add(other)
            log.warning(
                "another worker has the same id, so that their events cannot be told apart: "
                "set ACESTEP_WORKER_ID to another name for each worker",
                worker=self._worker_id,
            )
        if properties.message_type == _QUESTION:
            with suppress(BrokerError), mapped():
                await self._publish(message.channel, _ANSWER)
