# SPDX-License-Identifier: Apache-2.0
"""A subscription to events: none is missed over a lost connection, and none comes twice."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, Self
from uuid import uuid4

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
from pydantic import ValidationError

from acestep_consumer.broker.backoff import backoff
from acestep_consumer.broker.errors import BrokerError, BrokerRefused, ConnectionLost, describe, mapped
from acestep_consumer.broker.topology import EVENTS
from acestep_consumer.client.connection import (
    FIRST_WAIT_S,
    LONGEST_WAIT_S,
    ClientConnection,
    ObjectNotFound,
    as_client_error,
    checked,
    client_error,
    close_quietly,
)
from acestep_schemas.events import JobEvent, WorkerEvent, parse_event

PREFIX: Final = "acestep.client."
"""Prefix of subscribers' queues; a login that subscribes needs configure, write and read permission on them."""

# The broker deletes the queue of a client after this time without it; a shorter outage leaves no gap.
KEPT_MS: Final = 600_000
# Beyond this many unread events the oldest are dropped: one idle program must not fill the broker.
MAX_UNREAD: Final = 50_000
_ARGUMENTS: Final[dict[str, Any]] = {
    "x-queue-type": "classic",
    "x-expires": KEPT_MS,
    "x-max-length": MAX_UNREAD,
    "x-overflow": "drop-head",
}
RPC_TIMEOUT_S: Final = 10.0
SET_UP_TIMEOUT_S: Final = 30.0
# Time to delete the queue at the end. A broker that does not answer by then deletes it after ``KEPT_MS``.
END_TIMEOUT_S: Final = 1.0
_PREFETCH: Final = 100
_REMEMBERED_IDS: Final = 10_000

_log: Final = logging.getLogger("acestep_consumer.client")


class Subscription:
    """An async iterator over the events whose routing keys match. From entering it on, no event is missed.

    The queue is durable and this subscription's own: events that come while the connection is lost wait there. A repeat
    is recognised by the event's id. Iteration goes on until the caller stops.

    Args:
        connection: the connection to the broker.
        keys: routing keys such as ``job.#`` (all jobs), ``job.*.ID`` (one job), ``job.completed.*``, ``worker.#``.
        listener: called with each event before it is yielded.
        on_gap: called when the queue did not exist after a reconnect, so that events may have been missed.
    """

    def __init__(
        self,
        connection: ClientConnection,
        keys: Iterable[str] = (),
        *,
        listener: Callable[[JobEvent | WorkerEvent], None],
        on_gap: Callable[[], None] | None = None,
    ) -> None:
        self._connection = connection
        self._listener = listener
        self._keys = dict.fromkeys(keys)
        self._on_gap = on_gap
        self._name = PREFIX + uuid4().hex
        self._channel: AbstractChannel | None = None
        self._queue: AbstractQueue
        self._tag = ""
        # Deliveries of the present channel; None marks its end.
        self._arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        self._lost = False
        self._restoration: asyncio.Task[None] | None = None
        self._next: JobEvent | WorkerEvent | None = None
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._restoring = asyncio.Lock()
        # Set when the next channel is open.
        self._opened = asyncio.Event()

    async def __aenter__(self) -> Self:
        with as_client_error("no subscription"):
            await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._restoration is not None:
            self._restoration.cancel()
            await asyncio.wait({self._restoration})
        if self._channel is not None:
            with suppress(BrokerError), mapped():
                async with asyncio.timeout(END_TIMEOUT_S):
                    await self._queue.cancel(self._tag)
                    await self._queue.delete(if_unused=False, if_empty=False)
            await close_quietly(self._channel)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> JobEvent | WorkerEvent:
        """Return the next event; wait for it, and for the connection.

        Raises:
            Unreachable: the broker refuses the login or the queue; a lost connection is no error.
        """
        # A caller may be cancelled at any of these awaits and call again: the state stays in this object.
        while self._next is None:
            if self._lost:
                await asyncio.shield(self._restored())
            message = await self._arrived.get()
            self._lost = message is None
            if message is not None:
                self._next = self._parsed(message)
                with suppress(BrokerError), mapped():
                    await message.ack()
        event, self._next = self._next, None
        self._listener(event)
        return event

    async def bind(self, key: str) -> None:
        """Add a routing key, which holds from the return on. Somebody must be iterating. Raises ``ClientError``."""
        self._keys[key] = None
        opened = self._opened
        try:
            with checked():
                async with self._restoring:
                    await self._queue.bind(EVENTS, key, timeout=RPC_TIMEOUT_S)
        except ConnectionLost as fault:
            # The next channel binds all keys, this one among them.
            with as_client_error("no subscription"), mapped():
                async with asyncio.timeout(SET_UP_TIMEOUT_S):
                    await opened.wait()
            _log.info("subscribed to %s after %s", key, describe(fault))
        except BrokerError as fault:
            raise client_error(fault, "no subscription") from fault

    async def unbind(self, key: str) -> None:
        """Remove a routing key."""
        self._keys.pop(key, None)
        with suppress(BrokerError), checked():
            async with self._restoring:
                await self._queue.unbind(EVENTS, key, timeout=RPC_TIMEOUT_S)

    async def _open(self) -> None:
        channel = await self._connection.channel()
        try:
            with checked():
                async with asyncio.timeout(SET_UP_TIMEOUT_S):
                    await self._consume(channel)
        except BaseException:
            await close_quietly(channel)
            raise
        self._channel = channel
        self._lost = False
        opened, self._opened = self._opened, asyncio.Event()
        opened.set()

    async def _consume(self, channel: AbstractChannel) -> None:
        await channel.set_qos(prefetch_count=_PREFETCH)
        queue = await channel.declare_queue(self._name, durable=True, arguments=_ARGUMENTS)
        for key in tuple(self._keys):
            await queue.bind(EVENTS, key)
        # Deliveries of an old channel that nobody read are not acked: they come again on this one.
        arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        ended = lambda *_: arrived.put_nowait(None)  # noqa: E731 - the same for two callbacks
        channel.close_callbacks.add(ended)
        underlay = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(ended)
        self._tag = await queue.consume(arrived.put)
        self._queue, self._arrived = queue, arrived

    def _restored(self) -> asyncio.Task[None]:
        """Return the task that subscribes again, shared by all callers: one that is cancelled must not end it."""
        if self._restoration is None or self._restoration.done():
            self._restoration = asyncio.create_task(self._restore(), name="acestep client reconnects")
        return self._restoration

    async def _restore(self) -> None:
        """Subscribe again, for as long as it takes."""
        async with self._restoring:
            if self._channel is not None:
                await close_quietly(self._channel)
            for wait in backoff(FIRST_WAIT_S, LONGEST_WAIT_S):
                try:
                    gap = not await self._queue_exists()
                    await self._open()
                except BrokerRefused as fault:
                    with as_client_error("the subscription ended"):
                        raise fault from None
                except BrokerError as fault:
                    _log.warning("subscription lost: %s; trying again", describe(fault))
                    await asyncio.sleep(wait)
                else:
                    break
        if gap and self._on_gap is not None:
            self._on_gap()

    async def _queue_exists(self) -> bool:
        """Whether the broker still has this subscription's queue."""
        try:
            await self._connection.depth(self._name)
        except ObjectNotFound:
            return False
        return True

    def _parsed(self, message: AbstractIncomingMessage) -> JobEvent | WorkerEvent | None:
        """Return the event; None for a repeat, and for anything that is no known event."""
        event = known_event(message.body)
        if event is None or event.id in self._seen:
            return None
        self._seen[event.id] = None
        if len(self._seen) > _REMEMBERED_IDS:
            self._seen.popitem(last=False)
        return event


def known_event(body: bytes) -> JobEvent | WorkerEvent | None:
    """Return the event; None, with a warning in the log, for what is none that this version knows."""
    try:
        return parse_event(body)
    except ValidationError as error:
        _log.warning("skipped an unknown event: %s", error.errors(include_url=False)[0]["msg"])
        return None
