# SPDX-License-Identifier: Apache-2.0
"""Cancellations of the last week, which every worker reads from a stream.

Anyone may publish to ``acestep.control`` with the routing key ``cancel.<task_id>``; nothing else of the message counts
but its ``timestamp``. A stream keeps messages that were read. So a cancellation reaches all workers at once, holds for
a request that still waits, and outlives a time without workers. Each worker reads the stream from its beginning at
every connect, and has read all of the past when it reads a marker that it published itself.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog
from pamqp.commands import Basic

from acestep_consumer.broker.errors import BrokerError, ConnectionLost, mapped
from acestep_consumer.broker.topology import CANCEL, CONTROL, CONTROL_LOG, CONTROL_LOG_DAYS, SYNC
from acestep_schemas.request import is_task_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from acestep_consumer.broker.connection import BrokerConnection

RETENTION_S = CONTROL_LOG_DAYS * 24 * 3600.0
# More than the stream holds of the smallest messages; bounds memory where somebody declared a larger stream.
MAX_KNOWN = 100_000
PREFETCH = 1_000
# Shorter than the connection's time for all of its steps, so that the reason is logged.
CATCH_UP_TIMEOUT_S = 25.0

_PERSISTENT = 2

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _CancelRequest:
    """Times of a cancellation, in seconds since 1970: sent, as far as its sender said, and received, on our clock."""

    sent_s: float | None
    received_s: float


class CancellationLog:
    """Reads the stream on ``connection``, whose other traffic may have to wait some seconds for it."""

    def __init__(
        self,
        connection: BrokerConnection,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock`` returns seconds since 1970; ``elapsed`` those of a clock that nobody sets."""
        self._connection = connection
        self._clock = clock
        self._elapsed = elapsed
        # By task id, in the order in which they were received.
        self._known: dict[str, _CancelRequest] = {}
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._markers: dict[str, asyncio.Future[None]] = {}
        self._read = asyncio.Event()

    async def start(self) -> None:
        """Read the stream on this channel and on every later one; return when the past has been read.

        Raises:
            BrokerRefused: the user may not, or the stream was declared with other settings.
        """
        await self._connection.attach(self._follow)
        await self._read.wait()

    def is_cancelled(self, task_id: str, sent: datetime | None) -> bool:
        """Whether the job of a message is cancelled.

        Args:
            task_id: the job's id.
            sent: the message's own timestamp. A cancellation of an earlier second does not apply to it, so that an id
                can be used again. Where either has no timestamp, the cancellation applies.
        """
        cancel = self._known.get(task_id)
        if cancel is None or self._is_over(cancel):
            return False
        if cancel.sent_s is None or sent is None:
            return True
        # AMQP timestamps have whole seconds.
        return int(cancel.sent_s) >= int(sent.timestamp())

    async def wait(self, task_id: str, sent: datetime | None) -> None:
        """Return as soon as ``is_cancelled`` is true; maybe never."""
        while not self.is_cancelled(task_id, sent):
            arrival = asyncio.get_running_loop().create_future()
            waiting = self._waiting.setdefault(task_id, set())
            waiting.add(arrival)
            try:
                await arrival
            finally:
                waiting.discard(arrival)
                if not waiting:
                    del self._waiting[task_id]

    async def stop(self) -> None:
        """Do not read the stream on later channels."""
        self._connection.detach(self._follow)

    async def _follow(self, channel: Channel) -> None:
        """A ``Step``: read the stream from its beginning to this worker's own marker. Raises ``BrokerError``."""
        marker = uuid4().hex
        read = self._markers[marker] = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        try:
            with mapped():
                await self._read_past(channel, marker, read)
        finally:
            del self._markers[marker]
        log.debug("cancellations read", known=len(self._known), after_s=round(time.perf_counter() - began, 2))
        self._read.set()

    async def _read_past(self, channel: Channel, marker: str, read: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout(CATCH_UP_TIMEOUT_S):
                await self._subscribe(channel)
                await self._publish_marker(channel, marker)
                await asyncio.wait((read, channel.closing), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError as error:
            raise ConnectionLost(f"{CONTROL_LOG} was not read to its end in {CATCH_UP_TIMEOUT_S:g} s") from error
        if not read.done():
            raise ConnectionLost("the channel was closed")

    async def _subscribe(self, channel: Channel) -> None:
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled_by_broker)
        await channel.basic_qos(prefetch_count=PREFETCH)
        await channel.basic_consume(CONTROL_LOG, self._on_message, arguments={"x-stream-offset": "first"})

    async def _publish_marker(self, channel: Channel, marker: str) -> None:
        properties = Basic.Properties(delivery_mode=_PERSISTENT, timestamp=datetime.now(UTC))
        await channel.basic_publish(
            b"", exchange=CONTROL, routing_key=f"{SYNC}.{marker}", properties=properties, mandatory=True
        )

    def _on_cancelled_by_broker(self, _frame: Any) -> None:
        self._connection.reconnect(f"the broker stopped sending {CONTROL_LOG}")

    async def _on_message(self, message: DeliveredMessage) -> None:
        """Note the cancellation and ack. The body is ignored: anyone may publish here, so it may hold anything."""
        kind, _, name = (message.routing_key or "").partition(".")
        if kind == CANCEL:
            self._note(name, message.header.properties.timestamp)
        elif kind == SYNC and (marker := self._markers.get(name)) and not marker.done():
            marker.set_result(None)
        with suppress(BrokerError), mapped():
            # One by one: RabbitMQ before 4.3 closes the channel over a delivery that stays unacked for half an hour.
            await message.channel.basic_ack(message.delivery_tag or 0, wait=False)

    def _note(self, task_id: str, sent: datetime | None) -> None:
        if not is_task_id(task_id):
            return
        before = self._known.pop(task_id, None)
        cancel = _CancelRequest(_later(before, sent), self._elapsed())
        # Compared on arrival alone: a clock that is set later makes nothing old that was new.
        if cancel.sent_s is None or cancel.sent_s >= self._clock() - RETENTION_S:
            self._known[task_id] = cancel
        self._forget_old()
        for arrival in self._waiting.get(task_id, ()):
            if not arrival.done():
                arrival.set_result(None)

    def _forget_old(self) -> None:
        while self._known:
            first = next(iter(self._known))
            if len(self._known) <= MAX_KNOWN and not self._is_over(self._known[first]):
                return
            del self._known[first]

    def _is_over(self, cancel: _CancelRequest) -> bool:
        return self._elapsed() - cancel.received_s > RETENTION_S


def _later(before: _CancelRequest | None, sent: datetime | None) -> float | None:
    """Return the later of the two times, where both cancellations have one, else that of the new one."""
    sent_s = None if sent is None else sent.timestamp()
    if before is None or before.sent_s is None or sent_s is None:
        return sent_s
    return max(before.sent_s, sent_s)
