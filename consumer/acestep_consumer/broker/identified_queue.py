# SPDX-License-Identifier: Apache-2.0
"""Consumes requests that were given a message id, before the rest of the request queue.

A message without ``task_id`` and ``message_id`` has no identity: a redelivery could not be told from another message.
Its first consumer publishes a copy with a message id to a queue of its own and acks the original. The copy keeps its
priority and its expiration, and hardly waits: this queue comes first wherever a worker has room, and a worker that dies
in between leaves it to the others. The consumer reserves a place of its prefetch for the copy before it publishes it,
so no more messages are moved than can be worked on, and acks the original at once when the copy is confirmed. A worker
that is cut off in that moment leaves both: infra/docs/internals.md says why AMQP has no means against it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from acestep_consumer.broker.errors import BrokerError, ConnectionLost, describe, mapped
from acestep_consumer.broker.topology import IDENTIFIED, RPC_TIMEOUT_S

if TYPE_CHECKING:
    from acestep_consumer.broker.connection import BrokerConnection
    from acestep_consumer.broker.consumer import Consumer

# Time for a running look at the queue to end when the worker stops.
STOP_TIMEOUT_S = 5.0
# How often it looks for copies that a worker left which died.
POLL_S = 5.0
# While messages wait there.
BUSY_POLL_S = 0.25

log = structlog.get_logger()


class IdentifiedQueue:
    """Makes ``consumer`` take messages from the queue of identified requests while it holds any.

    Args:
        connection: the connection for looking at the queue.
        consumer: consumes, and divides its prefetch.
    """

    def __init__(self, connection: BrokerConnection, consumer: Consumer) -> None:
        self._connection = connection
        self._consumer = consumer
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Consume the queue from now on."""
        self._task = asyncio.create_task(self._run(), name="identified queue")

    async def stop(self) -> None:
        """Take no more from it. Running jobs are not affected."""
        self._stopping = True
        self._consumer.identified.set()
        if self._task is not None:
            # Not cancelled at once: aiormq closes the channel under a call that is cancelled.
            await asyncio.wait({self._task}, timeout=STOP_TIMEOUT_S if self._connection.is_up else 0)
            self._task.cancel()

    async def _run(self) -> None:
        while not self._stopping:
            busy = False
            try:
                busy = await self._serve()
            except BrokerError as fault:
                log.info("queue of identified requests unreachable", reason=describe(fault))
                await self._consumer.serve(IDENTIFIED, 0)
                await self._connection.channel()
            except Exception:
                log.exception("queue of identified requests: unexpected error")
            with suppress(TimeoutError):
                async with asyncio.timeout(BUSY_POLL_S if busy else POLL_S):
                    await self._consumer.identified.wait()
            if not self._stopping:
                self._consumer.identified.clear()

    async def _serve(self) -> bool:
        """Take what waits there. Returns whether anything does.

        With nothing left its consumers end at once, while their messages are being worked on.
        """
        if not self._connection.is_up:
            raise ConnectionLost("not connected")
        channel = await self._connection.channel()
        with mapped():
            found = await channel.queue_declare(IDENTIFIED, passive=True, timeout=RPC_TIMEOUT_S)
        waiting = (found.message_count or 0) + self._consumer.copying
        await self._consumer.serve(IDENTIFIED, waiting and waiting + self._consumer.unsettled(IDENTIFIED))
        return waiting > 0
