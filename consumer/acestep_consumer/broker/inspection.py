# SPDX-License-Identifier: Apache-2.0
"""A look at the broker that leaves it as it is: what stands there, what it may hold, what this user may do.

Every question gets a channel of its own, because the broker closes a channel over a refusal. Nothing is declared that
lasts: what is missing stays missing, and throw-away queues end with the connection at the latest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Self, TypeVar, cast
from uuid import uuid4

from aio_pika import exceptions as amqp
from aio_pika.connection import Connection
from aiormq.channel import Channel
from aiormq.exceptions import ChannelAccessRefused
from yarl import URL

from acestep_consumer.broker import queue_limit
from acestep_consumer.broker.errors import BrokerError, BrokerRefused, ConnectionLost, mapped
from acestep_consumer.broker.topology import GENERATE, PROBES, REQUESTS, Exchange, Queue, Topology

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType

    from aio_pika.abc import AbstractConnection
    from aiormq.abc import ArgumentsType

    from acestep_consumer.config.settings import BrokerSettings

T = TypeVar("T")
Operation = Literal["configure", "write", "read"]
Step = Callable[[Channel], Awaitable[None]]

CONNECT_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0
# What RabbitMQ calls the exchange without a name in its permissions.
DEFAULT_EXCHANGE = "amq.default"


class ObjectMissing(BrokerRefused):
    """There is no such object."""


class AccessRefused(BrokerRefused):
    """This user may not."""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """A queue at one moment: messages that wait, and consumers. Messages in consumers' hands are not counted."""

    ready: int
    consumers: int


@dataclass(frozen=True, slots=True)
class MissingPermission:
    """A permission that this user does not have on ``name``."""

    operation: Operation
    name: str

    def __str__(self) -> str:
        return f"{self.operation} on {self.name}"


@dataclass(frozen=True, slots=True)
class TopologyDiff:
    """The objects on the broker beside those that are wanted, as ``queue acestep.generate``.

    Attributes:
        missing: not there.
        different: there with other arguments; the broker's words.
        unseen: there, but this user may not declare it, which is how arguments are compared.
    """

    missing: tuple[str, ...]
    different: tuple[str, ...]
    unseen: tuple[str, ...]


class BrokerInspection:
    """A connection for looking. An async context manager; every call raises ``BrokerError``.

    Args:
        settings: the broker, and what a worker would want of it.
        name: what the broker lists the connection under.
    """

    def __init__(self, settings: BrokerSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._urls = tuple(URL(url.get_secret_value()) for url in settings.urls)
        self._url = self._urls[0]
        self._connection: AbstractConnection | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._drop()

    async def connect(self) -> None:
        """Connect to the first node that answers. Raises ``BrokerError``, that of the last one."""
        *others, last = self._urls
        for url in others:
            with suppress(ConnectionLost):
                return await self._connect(url)
        return await self._connect(last)

    async def _connect(self, url: URL) -> None:
        self._url = url
        # Known before it is open: a connection that could not be opened wants to be closed too.
        self._connection = connection = Connection(url, client_properties={"connection_name": self._name})
        try:
            with mapped():
                await connection.connect(timeout=CONNECT_TIMEOUT_S)
        except BaseException:
            await self._drop()
            raise

    @property
    def address(self) -> str:
        """The URL of the node that it is connected to, or tried last, without user, password and query."""
        return str(self._url.with_user(None).with_query(None))

    @property
    def version(self) -> str | None:
        """RabbitMQ's version, such as ``3.10.8``; None where it tells none."""
        transport = self._opened.transport
        told = transport.connection.server_properties.get("version") if transport else None
        return told if isinstance(told, str) else None

    async def depth(self, queue: str) -> QueueDepth | None:
        """Return how many messages wait and how many consumers there are; None: there is no such queue."""

        async def ask(channel: Channel) -> QueueDepth | None:
            try:
                told = await channel.queue_declare(queue, passive=True, timeout=CALL_TIMEOUT_S)
            except amqp.ChannelNotFoundEntity:
                return None
            return QueueDepth(told.message_count or 0, told.consumer_count or 0)

        return await self._ask(ask)

    async def depths(self, queues: Iterable[str]) -> dict[str, QueueDepth | None]:
        """Return ``depth`` of several queues. After ``ConnectionLost``, the next call connects again."""
        if self._connection is None:
            await self.connect()
        try:
            return {queue: await self.depth(queue) for queue in queues}
        except ConnectionLost:
            await self._drop()
            raise

    async def limit(self) -> queue_limit.LimitInForce | None:
        """Measure how many requests may wait; None: there is no request queue yet."""
        if await self.depth(GENERATE) is None:
            return None
        return await queue_limit.look(self._opened, self._settings)

    async def compare(self, wanted: Topology) -> TopologyDiff:
        """Compare exchanges and queues with those that stand. AMQP does not tell of bindings."""
        items: tuple[Exchange | Queue, ...] = (*wanted.exchanges, *wanted.queues)
        verdicts = await asyncio.gather(*map(self._compared, items))
        names = (f"{type(item).__name__.lower()} {item.name}" for item in items)
        found = list(zip(names, verdicts, strict=True))
        return TopologyDiff(
            missing=tuple(name for name, verdict in found if verdict == "missing"),
            different=tuple(str(verdict) for _, verdict in found if isinstance(verdict, BrokerRefused)),
            unseen=tuple(name for name, verdict in found if verdict == "unseen"),
        )

    async def lacks(self, wanted: Topology) -> tuple[MissingPermission, ...]:
        """Return what this user may not do, of what a worker does.

        Only throw-away queues are touched, with names like the request queue's: permissions go by name. Write
        permission on an exchange shows when a queue is declared that would dead-letter to it. Nothing is published: a
        publish is refused some time later, and what was said on its channel meanwhile costs the connection.
        """
        probe = _probe()
        lack = await self._lack(
            lambda channel: _declare(channel, probe), {probe: MissingPermission("configure", GENERATE)}
        )
        if lack is not None:
            return (lack,)
        to_default = {DEFAULT_EXCHANGE: MissingPermission("write", DEFAULT_EXCHANGE)}
        asked = [
            self._lack(lambda channel: _get(channel, probe), {probe: MissingPermission("read", GENERATE)}),
            self._lack(lambda channel: _dead_letter(channel, exchange=""), to_default),
        ]
        for name in (exchange.name for exchange in wanted.exchanges):
            bound = {name: MissingPermission("read", name), probe: MissingPermission("write", GENERATE)}
            asked.append(self._lack(partial(_bind, queue=probe, exchange=name), bound))
            if name != REQUESTS:  # a worker publishes no requests
                asked.append(self._lack(partial(_dead_letter, exchange=name), {name: MissingPermission("write", name)}))
        return tuple(dict.fromkeys(lack for lack in await asyncio.gather(*asked) if lack is not None))

    async def _lack(self, step: Step, by_name: Mapping[str, MissingPermission]) -> MissingPermission | None:
        """Try it; the refusal names the object, and ``by_name`` says what that means. What is missing is no lack."""
        try:
            await self._ask(step)
        except AccessRefused as refusal:
            return next((lack for name, lack in by_name.items() if f"'{name}'" in str(refusal)), None)
        except ObjectMissing:
            return None
        return None

    async def _compared(self, item: Exchange | Queue) -> Literal["missing", "unseen"] | BrokerRefused | None:
        try:
            # Only what is there is declared: that compares the arguments, and makes nothing.
            await self._ask(partial(_declare_as_wanted, item=item, passive=True))
            await self._ask(partial(_declare_as_wanted, item=item, passive=False))
        except ObjectMissing:
            return "missing"
        except AccessRefused:
            return "unseen"
        except BrokerRefused as refusal:
            return refusal
        return None

    async def _ask(self, step: Callable[[Channel], Awaitable[T]]) -> T:
        with _sorted():
            opened = await self._opened.channel(publisher_confirms=False)
            channel = cast("Channel", await opened.get_underlay_channel())
            answer = await step(channel)
            # Not after a refusal: then the broker closes it, and a second closing would cost the connection.
            await opened.close()
            return answer

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(BrokerError, TimeoutError), mapped():
                await asyncio.wait_for(connection.close(), CLOSE_TIMEOUT_S)

    @property
    def _opened(self) -> AbstractConnection:
        if self._connection is None:
            raise ConnectionLost("not connected")
        return self._connection


@contextmanager
def _sorted() -> Iterator[None]:
    """As ``mapped``, with what is missing and what is forbidden told apart."""
    try:
        with mapped():
            yield
    except BrokerError as fault:
        match fault.__cause__:
            case amqp.ChannelNotFoundEntity():
                raise ObjectMissing(str(fault)) from fault
            case ChannelAccessRefused():
                raise AccessRefused(str(fault)) from fault
        raise


def _probe() -> str:
    return f"{PROBES}{uuid4().hex}"


async def _declare(channel: Channel, queue: str, arguments: ArgumentsType | None = None) -> None:
    """Exclusive: it goes with the connection."""
    await channel.queue_declare(queue, exclusive=True, arguments=arguments, timeout=CALL_TIMEOUT_S)


async def _get(channel: Channel, queue: str) -> None:
    await channel.basic_get(queue, no_ack=True, timeout=CALL_TIMEOUT_S)


async def _bind(channel: Channel, *, queue: str, exchange: str) -> None:
    """Under a key that nobody uses: the queue stays empty."""
    await channel.queue_bind(queue, exchange, f"doctor.{queue}", timeout=CALL_TIMEOUT_S)
    await channel.queue_unbind(queue, exchange, f"doctor.{queue}", timeout=CALL_TIMEOUT_S)


async def _dead_letter(channel: Channel, *, exchange: str) -> None:
    queue = _probe()
    await _declare(channel, queue, {"x-dead-letter-exchange": exchange})
    await channel.queue_delete(queue, timeout=CALL_TIMEOUT_S)


async def _declare_as_wanted(channel: Channel, *, item: Exchange | Queue, passive: bool) -> None:
    """Passive: ask whether it is there, whatever its arguments."""
    arguments: ArgumentsType = dict(item.arguments)
    if isinstance(item, Queue):
        await channel.queue_declare(
            item.name, passive=passive, durable=True, arguments=arguments, timeout=CALL_TIMEOUT_S
        )
        return
    await channel.exchange_declare(
        item.name,
        exchange_type=item.type,
        passive=passive,
        durable=True,
        arguments=arguments,
        timeout=CALL_TIMEOUT_S,
    )
