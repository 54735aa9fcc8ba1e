# SPDX-License-Identifier: Apache-2.0
"""Whose work nobody wants any more: every cancellation of the last week, known to every worker.

Anyone publishes to ``acestep.control`` with the routing key ``cancel.<task_id>``; of the message nothing else counts
but its ``timestamp``. A stream keeps it: what is read from a stream stays there. So a cancellation reaches all workers
at once, holds for a request that still waits, and outlives a time without any worker. Each worker reads the stream from
its beginning at every connect. It knows that it has read all of the past once it reads a mark that it published itself.
"""

from __future__ import annotations

import asyncio
import re
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
from acestep_schemas.request import TASK_ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from acestep_consumer.broker.connection import BrokerConnection

RETENTION_S = CONTROL_LOG_DAYS * 24 * 3600.0
# More than the stream holds of the smallest messages: a bound against a broker whose stream somebody declared larger.
KEPT_AT_MOST = 100_000
PREFETCH = 1_000
# Shorter than what a link allows for all of its steps, so that the reason can be told.
CATCH_UP_TIMEOUT_S = 25.0

_PERSISTENT = 2
_TASK_ID = re.compile(TASK_ID_PATTERN)

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _CancelRequest:
    """When it was sent, as far as its sender told, and when it was heard here; seconds since 1970."""

    sent_s: float | None
    heard_s: float


class CancellationLog:
    """Follows the stream on ``link``, which should carry nothing that must not wait for a reading of some seconds."""

    def __init__(self, link: BrokerConnection, clock: Callable[[], float] = time.time) -> None:
        """``clock`` returns seconds since 1970."""
        self._link = link
        self._clock = clock
        # The one heard last stands last.
        self._known: dict[str, _CancelRequest] = {}
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._marks: dict[str, asyncio.Future[None]] = {}
        self._read = asyncio.Event()

    async def start(self) -> None:
        """Follow the stream on this channel and on every later one; return when the past has been read.

        Raises:
            BrokerRefused: the user may not, or the stream was declared otherwise.
        """
        await self._link.attach(self._follow)
        await self._read.wait()

    def asked(self, task_id: str, sent: datetime | None) -> bool:
        """Whether this message shall not be run.

        Args:
            task_id: whose.
            sent: the message's own time. A cancellation of an earlier second is not meant for it, so that an id can be
                used again. Where either has no time, the cancellation counts.
        """
        cancel = self._known.get(task_id)
        if cancel is None or self._is_old(cancel):
            return False
        if cancel.sent_s is None or sent is None:
            return True
        # AMQP tells whole seconds.
        return int(cancel.sent_s) >= int(sent.timestamp())

    async def wait(self, task_id: str, sent: datetime | None) -> None:
        """Return as soon as ``asked`` is true; maybe never."""
        while not self.asked(task_id, sent):
            news = asyncio.get_running_loop().create_future()
            waiting = self._waiting.setdefault(task_id, set())
            waiting.add(news)
            try:
                await news
            finally:
                waiting.discard(news)
                if not waiting:
                    del self._waiting[task_id]

    async def stop(self) -> None:
        """Hear no more on later channels."""
        self._link.detach(self._follow)

    async def _follow(self, channel: Channel) -> None:
        """A ``Step``: read from the beginning, to one's own mark at least. Raises ``BrokerError``."""
        mark = uuid4().hex
        read = self._marks[mark] = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        try:
            with mapped():
                await self._read_past(channel, mark, read)
        finally:
            del self._marks[mark]
        _log.debug("cancellations read", known=len(self._known), after_s=round(time.perf_counter() - began, 2))
        self._read.set()

    async def _read_past(self, channel: Channel, mark: str, read: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout(CATCH_UP_TIMEOUT_S):
                await self._subscribe(channel)
                await self._publish_mark(channel, mark)
                await asyncio.wait((read, channel.closing), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError as error:
            raise ConnectionLost(f"{CONTROL_LOG} was not read to its end in {CATCH_UP_TIMEOUT_S:g} s") from error
        if not read.done():
            raise ConnectionLost("the channel was closed")

    async def _subscribe(self, channel: Channel) -> None:
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled_by_broker)
        await channel.basic_qos(prefetch_count=PREFETCH)
        await channel.basic_consume(CONTROL_LOG, self._hear, arguments={"x-stream-offset": "first"})

    async def _publish_mark(self, channel: Channel, mark: str) -> None:
        properties = Basic.Properties(delivery_mode=_PERSISTENT, timestamp=datetime.now(UTC))
        await channel.basic_publish(
            b"", exchange=CONTROL, routing_key=f"{SYNC}.{mark}", properties=properties, mandatory=True
        )

    def _on_cancelled_by_broker(self, _frame: Any) -> None:
        self._link.renew(f"the broker stopped sending {CONTROL_LOG}")

    async def _hear(self, message: DeliveredMessage) -> None:
        """Take note and ask for more. Bodies are not looked at: anyone may write here, so anything may be in them."""
        kind, _, name = (message.routing_key or "").partition(".")
        if kind == CANCEL:
            self._note(name, message.header.properties.timestamp)
        elif kind == SYNC and (mark := self._marks.get(name)) and not mark.done():
            mark.set_result(None)
        with suppress(BrokerError), mapped():
            # Each by itself: what stays unacked for half an hour costs the channel on RabbitMQ before 4.3.
            await message.channel.basic_ack(message.delivery_tag or 0, wait=False)

    def _note(self, task_id: str, sent: datetime | None) -> None:
        if not _TASK_ID.fullmatch(task_id):
            return
        before = self._known.pop(task_id, None)
        cancel = _CancelRequest(_later(before, sent), self._clock())
        if not self._is_old(cancel):
            self._known[task_id] = cancel
        self._forget()
        for news in self._waiting.get(task_id, ()):
            if not news.done():
                news.set_result(None)

    def _forget(self) -> None:
        while self._known:
            first = next(iter(self._known))
            if len(self._known) <= KEPT_AT_MOST and not self._is_old(self._known[first]):
                return
            del self._known[first]

    def _is_old(self, cancel: _CancelRequest) -> bool:
        oldest = self._clock() - RETENTION_S
        return cancel.heard_s < oldest or (cancel.sent_s is not None and cancel.sent_s < oldest)


def _later(before: _CancelRequest | None, sent: datetime | None) -> float | None:
    """Return the time of the two together: the later one, as far as both have one, else that of the new one."""
    sent_s = None if sent is None else sent.timestamp()
    if before is None or before.sent_s is None or sent_s is None:
        return sent_s
    return max(before.sent_s, sent_s)
