# SPDX-License-Identifier: Apache-2.0
"""Events as they come: none missed over a lost connection, none twice."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, Self
from uuid import uuid4

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
from pydantic import TypeAdapter, ValidationError

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
from acestep_schemas.events import Event, JobEvent, WorkerEvent

PREFIX: Final = "acestep.client."
"""Names of subscribers' queues begin so; a login that subscribes needs configure, write and read on them."""

# How long the broker keeps the queue of a client that went away; so long may a connection be gone without a gap.
KEPT_MS: Final = 600_000
# More than this many events unread, and the oldest are dropped: one idle program must not fill the broker.
MOST_UNREAD: Final = 50_000
_ARGUMENTS: Final[dict[str, Any]] = {
    "x-queue-type": "classic",
    "x-expires": KEPT_MS,
    "x-max-length": MOST_UNREAD,
    "x-overflow": "drop-head",
}
RPC_TIMEOUT_S: Final = 10.0
SET_UP_TIMEOUT_S: Final = 30.0
_PREFETCH: Final = 100
_REMEMBERED: Final = 10_000

_log: Final = logging.getLogger("acestep_consumer.client")
_EVENT: Final[TypeAdapter[JobEvent | WorkerEvent]] = TypeAdapter(Event)


class Subscription:
    """An async iterator over the events whose routing keys match. Entering it makes the queue: nothing after is missed.

    The queue is this subscription's own and durable, and outlives the connection: what comes while the connection is
    gone waits there. A repeat is recognised by the event's id. Iterating goes on until the caller stops.

    Args:
        line: the connection.
        keys: routing keys such as ``job.#`` (all jobs), ``job.*.ID`` (one job), ``job.completed.*``, ``worker.#``.
        listener: called with each event before it is handed out.
        on_gap: called when the queue was gone after a reconnect, so that events may have been missed.
    """

    def __init__(
        self,
        line: ClientConnection,
        keys: Iterable[str] = (),
        *,
        listener: Callable[[JobEvent | WorkerEvent], None],
        on_gap: Callable[[], None] | None = None,
    ) -> None:
        self._line = line
        self._listener = listener
        self._keys = dict.fromkeys(keys)
        self._on_gap = on_gap
        self._name = PREFIX + uuid4().hex
        self._channel: AbstractChannel | None = None
        self._queue: AbstractQueue
        self._tag = ""
        # Of the present channel; None in it says that the channel ended.
        self._arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        self._lost = False
        self._repair: asyncio.Task[None] | None = None
        self._held: JobEvent | WorkerEvent | None = None
        self._heard: OrderedDict[str, None] = OrderedDict()
        self._restoring = asyncio.Lock()
        # Set when the next channel is open.
        self._opened = asyncio.Event()

    async def __aenter__(self) -> Self:
        with as_client_error("no subscription"):
            await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._repair is not None:
            self._repair.cancel()
            await asyncio.wait({self._repair})
        if self._channel is not None:
            with suppress(BrokerError), mapped():
                await self._queue.cancel(self._tag, timeout=LONGEST_WAIT_S)
                await self._queue.delete(if_unused=False, if_empty=False, timeout=LONGEST_WAIT_S)
            await close_quietly(self._channel)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> JobEvent | WorkerEvent:
        """Return the next event; wait for it, and for the connection.

        Raises:
            Unreachable: the broker refuses the login or the queue; a connection that is lost is no error.
        """
        # A caller may give up waiting at any of these awaits, and come again: what is known stays in this object.
        while self._held is None:
            if self._lost:
                await asyncio.shield(self._repaired())
            message = await self._arrived.get()
            self._lost = message is None
            if message is not None:
                self._held = self._read(message)
                with suppress(BrokerError), mapped():
                    await message.ack()
        event, self._held = self._held, None
        self._listener(event)
        return event

    async def add(self, key: str) -> None:
        """Hear ``key`` too, from the return on. Somebody must be iterating. Raises ``ClientError``."""
        self._keys[key] = None
        opened = self._opened
        try:
            with checked():
                async with self._restoring:
                    await self._queue.bind(EVENTS, key, timeout=RPC_TIMEOUT_S)
        except ConnectionLost as fault:
            # The next channel is opened with all keys, this one among them.
            with as_client_error("no subscription"), mapped():
                await asyncio.wait_for(opened.wait(), SET_UP_TIMEOUT_S)
            _log.info("subscribed to %s after %s", key, describe(fault))
        except BrokerError as fault:
            raise client_error(fault, "no subscription") from fault

    async def drop(self, key: str) -> None:
        """Do not hear ``key`` any more."""
        self._keys.pop(key, None)
        with suppress(BrokerError), checked():
            async with self._restoring:
                await self._queue.unbind(EVENTS, key, timeout=RPC_TIMEOUT_S)

    async def _open(self) -> None:
        channel = await self._line.channel()
        try:
            with checked():
                await asyncio.wait_for(self._consume(channel), SET_UP_TIMEOUT_S)
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
        # What an old channel brought and nobody read is not acked: it comes again on this one.
        arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        ended = lambda *_: arrived.put_nowait(None)  # noqa: E731 - two callbacks, one thought
        channel.close_callbacks.add(ended)
        underlay = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(ended)
        self._tag = await queue.consume(arrived.put)
        self._queue, self._arrived = queue, arrived

    def _repaired(self) -> asyncio.Task[None]:
        """The one restoration under way; a caller with little patience must not end it, or it might never be done."""
        if self._repair is None or self._repair.done():
            self._repair = asyncio.create_task(self._restore(), name="acestep client reconnects")
        return self._repair

    async def _restore(self) -> None:
        """Subscribe again, for as long as it takes."""
        async with self._restoring:
            if self._channel is not None:
                await close_quietly(self._channel)
            for wait in backoff(FIRST_WAIT_S, LONGEST_WAIT_S):
                try:
                    gap = not await self._is_there()
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

    async def _is_there(self) -> bool:
        """Whether the broker still has our queue."""
        try:
            await self._line.depth(self._name)
        except ObjectNotFound:
            return False
        return True

    def _read(self, message: AbstractIncomingMessage) -> JobEvent | WorkerEvent | None:
        """Parse an event; None for one heard before, and for what is none of ours."""
        try:
            # Fields of a newer worker are left out: they must not make this program deaf.
            event = _EVENT.validate_json(message.body, extra="ignore")
        except ValidationError as error:
            _log.warning("skipped a message that is no known event: %s", error.errors(include_url=False)[0]["msg"])
            return None
        if event.id in self._heard:
            return None
        self._heard[event.id] = None
        if len(self._heard) > _REMEMBERED:
            self._heard.popitem(last=False)
        return event
