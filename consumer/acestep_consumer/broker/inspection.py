# SPDX-License-Identifier: Apache-2.0
"""Read-only inspection of the broker: its objects, the queue's limit, this user's permissions.

Each operation gets a channel of its own, because the broker closes a channel over a refusal. Nothing lasting is
declared: missing objects stay missing, and throw-away queues end with the connection at the latest.
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
from aiormq.channel import Channel
from aiormq.exceptions import ChannelAccessRefused
from yarl import URL

from acestep_consumer.broker import queue_limit
from acestep_consumer.broker.channel_numbers import NumberedConnection, version_of
from acestep_consumer.broker.errors import BrokerError, BrokerRefused, ConnectionLost, connecting, end_within, mapped
from acestep_consumer.broker.topology import GENERATE, PROBES, REQUESTS, Exchange, Queue, Topology

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from aio_pika.abc import AbstractConnection
    from aiormq.abc import ArgumentsType

    from acestep_consumer.broker.connection import Step
    from acestep_consumer.config.settings import BrokerSettings

T = TypeVar("T")
Operation = Literal["configure", "write", "read"]

TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0
# RabbitMQ's name in permissions for the exchange without a name.
DEFAULT_EXCHANGE = "amq.default"


class ObjectMissing(BrokerRefused):
    """The object does not exist."""


class AccessRefused(BrokerRefused):
    """The user lacks a permission."""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """A queue at one moment: messages that wait (unacked ones are not counted), and consumers."""

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
    """Differences between the broker's objects and the wanted ones, named as in ``queue acestep.generate``.

    Attributes:
        missing: objects that do not exist.
        different: the broker's texts about objects with other arguments.
        unseen: objects that exist but whose arguments are unknown, since this user may not declare them.
    """

    missing: tuple[str, ...]
    different: tuple[str, ...]
    unseen: tuple[str, ...]


class BrokerInspection:
    """A connection for inspection. An async context manager; every call raises ``BrokerError``.

    Args:
        settings: the broker, and the queue type and limit that a worker would use.
        name: the connection's name on the broker.
        timeout_s: seconds to wait for the connection, whichever node it is to, and for each operation.
    """

    def __init__(self, settings: BrokerSettings, name: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._settings = settings
        self._name = name
        self._timeout_s = timeout_s
        self._urls = tuple(URL(url.get_secret_value()) for url in settings.urls)
        self._url = self._urls[0]
        self._connection: AbstractConnection | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._drop()

    async def connect(self) -> None:
        """Connect to the first node that answers. Raises the ``BrokerError`` of the last one."""
        *others, last = self._urls
        for url in others:
            with suppress(ConnectionLost):
                return await self._connect(url)
        return await self._connect(last)

    async def _connect(self, url: URL) -> None:
        self._url = url
        # Stored before it is open: a connection that could not be opened has to be closed too.
        self._connection = connection = NumberedConnection(url, client_properties={"connection_name": self._name})
        timeout_s = self._timeout_s / len(self._urls)
        try:
            with connecting(timeout_s):
                await connection.connect(timeout=timeout_s)
        except BaseException:
            await self._drop()
            raise

    @property
    def address(self) -> str:
        """The URL of the node that it is connected to, or tried last, without user, password and query."""
        return str(self._url.with_user(None).with_query(None))

    @property
    def version(self) -> str | None:
        """RabbitMQ's version, such as ``3.10.8``; None where the broker does not report it."""
        return version_of(self._opened)

    async def depth(self, queue: str) -> QueueDepth | None:
        """Return how many messages wait and how many consumers there are; None: the queue does not exist."""

        async def ask(channel: Channel) -> QueueDepth | None:
            try:
                found = await channel.queue_declare(queue, passive=True)
            except amqp.ChannelNotFoundEntity:
                return None
            return QueueDepth(found.message_count or 0, found.consumer_count or 0)

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
        """Measure how many requests may wait; None: the request queue does not exist yet."""
        if await self.depth(GENERATE) is None:
            return None
        return await queue_limit.measure(self._opened, self._settings)

    async def compare(self, wanted: Topology) -> TopologyDiff:
        """Compare exchanges and queues with the existing ones. Bindings cannot be compared over AMQP."""
        items: tuple[Exchange | Queue, ...] = (*wanted.exchanges, *wanted.queues)
        verdicts = await asyncio.gather(*map(self._compared, items))
        names = (f"{type(item).__name__.lower()} {item.name}" for item in items)
        found = list(zip(names, verdicts, strict=True))
        return TopologyDiff(
            missing=tuple(name for name, verdict in found if verdict == "missing"),
            different=tuple(str(verdict) for _, verdict in found if isinstance(verdict, BrokerRefused)),
            unseen=tuple(name for name, verdict in found if verdict == "unseen"),
        )

    async def missing_permissions(self, wanted: Topology) -> tuple[MissingPermission, ...]:
        """Return the permissions that a worker needs and this user does not have.

        Only throw-away queues are used, with names like the request queue's: permissions go by name. Write permission
        on an exchange shows when a queue is declared that would dead-letter to it. Nothing is published: a publish is
        refused some time later, and other operations on its channel meanwhile would cost the connection.
        """
        probe = _probe()
        missing = await self._missing(
            lambda channel: _declare(channel, probe), {probe: MissingPermission("configure", GENERATE)}
        )
        if missing is not None:
            return (missing,)
        to_default = {DEFAULT_EXCHANGE: MissingPermission("write", DEFAULT_EXCHANGE)}
        asked = [
            self._missing(lambda channel: _get(channel, probe), {probe: MissingPermission("read", GENERATE)}),
            self._missing(lambda channel: _dead_letter(channel, exchange=""), to_default),
        ]
        for name in (exchange.name for exchange in wanted.exchanges):
            bound = {name: MissingPermission("read", name), probe: MissingPermission("write", GENERATE)}
            asked.append(self._missing(partial(_bind, queue=probe, exchange=name), bound))
            if name != REQUESTS:  # a worker publishes no requests
                asked.append(
                    self._missing(partial(_dead_letter, exchange=name), {name: MissingPermission("write", name)})
                )
        return tuple(dict.fromkeys(missing for missing in await asyncio.gather(*asked) if missing is not None))

    async def _missing(self, step: Step, by_name: Mapping[str, MissingPermission]) -> MissingPermission | None:
        """Run ``step`` and return the permission of the object in the broker's refusal; None: no refusal.

        An object that does not exist is no missing permission.
        """
        try:
            await self._ask(step)
        except AccessRefused as refusal:
            return next((missing for name, missing in by_name.items() if f"'{name}'" in str(refusal)), None)
        except ObjectMissing:
            return None
        return None

    async def _compared(self, item: Exchange | Queue) -> Literal["missing", "unseen"] | BrokerRefused | None:
        try:
            # Declaring an existing object compares its arguments and creates nothing.
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
        with _mapped():
            async with asyncio.timeout(self._timeout_s):
                opened = await self._opened.channel(publisher_confirms=False)
                channel = cast("Channel", await opened.get_underlay_channel())
                answer = await step(channel)
                # Not after a refusal: the broker has closed it then, and closing it again would cost the connection.
                await opened.close()
                return answer

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await end_within(CLOSE_TIMEOUT_S, connection.close())

    @property
    def _opened(self) -> AbstractConnection:
        if self._connection is None:
            raise ConnectionLost("not connected")
        return self._connection


@contextmanager
def _mapped() -> Iterator[None]:
    """As ``mapped``, with ``ObjectMissing`` and ``AccessRefused`` told apart."""
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
    """Declare an exclusive queue, which is deleted with the connection."""
    await channel.queue_declare(queue, exclusive=True, arguments=arguments)


async def _get(channel: Channel, queue: str) -> None:
    await channel.basic_get(queue, no_ack=True)


async def _bind(channel: Channel, *, queue: str, exchange: str) -> None:
    """Bind and unbind with a routing key that nobody uses, so that the queue stays empty."""
    await channel.queue_bind(queue, exchange, f"doctor.{queue}")
    await channel.queue_unbind(queue, exchange, f"doctor.{queue}")


async def _dead_letter(channel: Channel, *, exchange: str) -> None:
    queue = _probe()
    await _declare(channel, queue, {"x-dead-letter-exchange": exchange})
    await channel.queue_delete(queue)


async def _declare_as_wanted(channel: Channel, *, item: Exchange | Queue, passive: bool) -> None:
    """Declare the object; ``passive``: check that it exists, with any arguments."""
    arguments: ArgumentsType = dict(item.arguments)
    if isinstance(item, Queue):
        await channel.queue_declare(item.name, passive=passive, durable=True, arguments=arguments)
        return
    await channel.exchange_declare(
        item.name,
        exchange_type=item.type,
        passive=passive,
        durable=True,
        arguments=arguments,
    )
