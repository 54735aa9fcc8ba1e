# SPDX-License-Identifier: Apache-2.0
"""The client's AMQP connection: opened when it is needed, and again after it was lost; and publishing over it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import TYPE_CHECKING, Final, Self, cast

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import ChannelNotFoundEntity
from yarl import URL

from acestep_consumer.broker.backoff import backoff
from acestep_consumer.broker.channel_numbers import connect
from acestep_consumer.broker.errors import (
    CHECK_BROKER,
    BrokerError,
    BrokerRefused,
    ConnectionLost,
    Nacked,
    describe,
    end_within,
    mapped,
)
from acestep_consumer.broker.topology import CONTROL, STATUS
from acestep_consumer.client.errors import ClientError, NoQueue, Unreachable
from acestep_consumer.config.amqp_urls import ENCODING, has_raw_login, problem_of_parameters, split_urls

if TYPE_CHECKING:
    from aiormq.channel import Channel

# A dead peer is noticed after two of them. The worker's is shorter; a program that computes between two of its calls
# must not lose its connection at once.
HEARTBEAT_S: Final = 30
CONNECT_TIMEOUT_S: Final = 10.0
# Nothing is lost by not hearing the broker's answer: what was published is confirmed already.
CLOSE_TIMEOUT_S: Final = 0.5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0

NOT_DECLARED: Final = "start a worker, or run `acestep-consumer topology --declare`"
UNKNOWN: Final = "whether it was accepted is unknown; sending the same task id again is safe"

_log: Final = logging.getLogger("acestep_consumer.client")


class ObjectNotFound(BrokerError):
    """An exchange or a queue does not exist."""


class ClientConnection:
    """Owns the connection and the channel that publishes. Entering connects, so that a wrong URL shows at once.

    Args:
        url: ``amqp://`` or ``amqps://``; of a cluster, its nodes' URLs, comma-separated.
        patience_s: seconds that a publish is retried over lost connections.
    """

    def __init__(self, url: str, patience_s: float) -> None:
        urls = tuple(map(_with_heartbeat, split_urls(url)))
        self._urls, self._nodes = cycle(urls), len(urls)
        self._patience_s = patience_s
        self._connection: AbstractConnection | None = None
        self._publishing: AbstractChannel | None = None
        # Publishes that wait for their confirm, by channel.
        self._unconfirmed: Counter[AbstractChannel] = Counter()
        self._connecting = asyncio.Lock()
        self._closed = False

    async def __aenter__(self) -> Self:
        with as_client_error("no connection to the broker"):
            await self._connected()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        await self._drop()

    async def channel(self) -> AbstractChannel:
        """Open a channel for a subscription. Raises ``BrokerError``."""
        connection = await self._connected()
        with checked():
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await connection.channel(publisher_confirms=False)

    async def depth(self, queue: str) -> tuple[int, int]:
        """Return (messages ready, consumers) of a queue. Raises ``BrokerError``."""
        channel = await self.channel()
        try:
            with checked():
                declared = (await channel.declare_queue(queue, passive=True)).declaration_result
        finally:
            await close_quietly(channel)
        return declared.message_count or 0, declared.consumer_count or 0

    async def request_statuses(self) -> None:
        """Ask every worker to announce itself, without a retry, on a channel of its own: a refusal closes the channel.

        Raises:
            BrokerError: it was refused, or the connection was lost.
        """
        connection = await self._connected()
        with checked():
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                channel = await connection.channel(publisher_confirms=True)
        try:
            await _publish(channel, CONTROL, STATUS, aio_pika.Message(b""))
        finally:
            await close_quietly(channel)

    async def publish(self, exchange: str, routing_key: str, message: aio_pika.Message) -> None:
        """Publish and retry over lost connections until the broker confirms.

        Raises:
            Nacked: it was refused, and no earlier try can have been accepted.
            Unroutable: no queue takes it.
            NoQueue: the exchange does not exist.
            Unreachable: no confirm in time, or a refusal after a try whose confirm was lost.
        """
        sent = unsure = False
        fault: BrokerError | None = None
        try:
            async with asyncio.timeout(self._patience_s):
                for wait in backoff(FIRST_WAIT_S, LONGEST_WAIT_S):
                    try:
                        channel = await self._publisher()
                        sent, unsure = True, sent
                        return await self._send(channel, exchange, routing_key, message)
                    except Nacked as error:
                        if unsure:
                            raise Unreachable(f"the connection was lost before the confirm; {UNKNOWN}") from error
                        raise
                    except ConnectionLost as error:
                        fault = error
                        _log.warning("broker connection lost while publishing: %s; trying again", describe(error))
                    await asyncio.sleep(wait)
        except TimeoutError:
            raise Unreachable(_gave_up(self._patience_s, fault, sent=sent)) from fault
        except (ObjectNotFound, BrokerRefused) as error:
            raise client_error(error, "the request was not accepted") from error

    async def _publisher(self) -> AbstractChannel:
        async with self._connecting:
            if self._publishing is None or self._publishing.is_closed:
                connection = await self._connect()
                with checked():
                    self._publishing = await connection.channel(publisher_confirms=True, on_return_raises=True)
            return self._publishing

    async def _send(self, channel: AbstractChannel, exchange: str, routing_key: str, message: aio_pika.Message) -> None:
        """Publish once. A channel is not used again after a refusal, and closed when nothing waits on it.

        RabbitMQ 3.10 refuses all that a channel sends to a quorum queue if its first publish came while the queue had
        no leader. That looks the same as a full queue.
        """
        self._unconfirmed[channel] += 1
        try:
            await _publish(channel, exchange, routing_key, message)
        except Nacked:
            if channel is self._publishing:
                self._publishing = None
            raise
        finally:
            self._unconfirmed[channel] -= 1
            if not self._unconfirmed[channel]:
                del self._unconfirmed[channel]
                if channel is not self._publishing:
                    await close_quietly(channel)

    async def _connected(self) -> AbstractConnection:
        async with self._connecting:
            return await self._connect()

    async def _connect(self) -> AbstractConnection:
        if self._closed:
            raise BrokerRefused("this client is closed: use it inside `async with Client() as client`")
        if self._connection is None or _is_lost(self._connection):
            await self._drop()
            self._connection = await self._connect_to_any()
        return self._connection

    async def _connect_to_any(self) -> AbstractConnection:
        """Try each node of the cluster once, beginning with the next one."""
        for url in islice(self._urls, self._nodes - 1):
            try:
                return await _connect(url)
            except ConnectionLost as error:
                _log.warning("broker node not reachable: %s; trying the next one", describe(error))
        return await _connect(next(self._urls))

    async def _drop(self) -> None:
        connection, self._connection, self._publishing = self._connection, None, None
        if connection is not None:
            await end_within(CLOSE_TIMEOUT_S, connection.close())
            await connection.close()  # returns at once where the first call ran out of time


@contextmanager
def checked() -> Iterator[None]:
    """Turn aio-pika's exceptions into ``BrokerError``; ``ObjectNotFound`` where something does not exist."""
    with mapped():
        try:
            yield
        except ChannelNotFoundEntity as error:
            raise ObjectNotFound(str(error)) from error


def client_error(fault: BrokerError, what: str) -> ClientError:
    """Return the error that the caller of the client gets for ``fault``; ``what`` did not happen."""
    if isinstance(fault, ObjectNotFound):
        return NoQueue(f"{what}: the queues are not declared yet; {NOT_DECLARED}")
    hint = "" if isinstance(fault, BrokerRefused) else f"; {CHECK_BROKER}"
    return Unreachable(f"{what}: {describe(fault)}{hint}")


@contextmanager
def as_client_error(what: str) -> Iterator[None]:
    """Raise a ``ClientError`` in place of a ``BrokerError``; ``what`` did not happen."""
    try:
        yield
    except BrokerError as fault:
        raise client_error(fault, what) from fault


async def close_quietly(channel: AbstractChannel) -> None:
    """Close a channel that may be closed already."""
    if not channel.is_closed:
        await end_within(CLOSE_TIMEOUT_S, channel.close())


async def _publish(channel: AbstractChannel, exchange: str, routing_key: str, message: aio_pika.Message) -> None:
    """Publish and wait for the confirm.

    Not by aio-pika's exchange, which holds the channel until the socket has taken each message: some turns of the event
    loop, in which a server with hundreds of requests at a time gets nothing else published. The confirm says more, and
    bounds what waits in memory by those who wait for it.
    """
    with checked():
        underlay = cast("Channel", await channel.get_underlay_channel())
        await underlay.basic_publish(
            message.body,
            exchange=exchange,
            routing_key=routing_key,
            properties=message.properties,
            mandatory=True,
            wait=False,
        )


async def _connect(url: URL) -> AbstractConnection:
    with checked():
        return await connect(url, "acestep client", CONNECT_TIMEOUT_S)


def _is_lost(connection: AbstractConnection) -> bool:
    """Whether the connection is closed by either side; its own `is_closed` tells of this side only."""
    return connection.transport is None or connection.transport.connection.is_closed


def _gave_up(patience_s: float, fault: BrokerError | None, *, sent: bool) -> str:
    why = f": {describe(fault)}" if fault else "; it takes no messages while its memory or disk is short"
    text = f"the broker did not confirm within {patience_s:g} s{why}"
    return f"{text}; {UNKNOWN}" if sent else f"{text}; nothing was sent"


def _with_heartbeat(url: str) -> URL:
    try:
        parsed = URL(url)
    except ValueError:
        parsed = None
    if parsed is None or parsed.scheme not in {"amqp", "amqps"} or not parsed.host or has_raw_login(url):
        # yarl's own message quotes a part of the password.
        raise ValueError(f"the URL must look like amqp://user:password@host:5672/vhost; {ENCODING}") from None
    if problem := problem_of_parameters(url):
        raise ValueError(problem)
    return parsed if "heartbeat" in parsed.query else parsed.update_query(heartbeat=HEARTBEAT_S)
