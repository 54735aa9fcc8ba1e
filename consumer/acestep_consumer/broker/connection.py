# SPDX-License-Identifier: Apache-2.0
"""One AMQP connection with one channel, kept alive.

Not aio-pika's robust connection: that one restores what it remembers, so a single object that cannot be restored
blocks all others, and it takes a queue's depth and existence from memory. Here every connect is a first connect:
connect, open the channel, declare the topology, run the attached steps. Whatever is lost, be it the connection, the
channel, a queue or the consumer, all is dropped and made again; there is one path to get right.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import cycle
from typing import TYPE_CHECKING, Self, cast

import structlog
from aio_pika import Connection
from aiormq.channel import Channel
from yarl import URL

from acestep_consumer.broker import lenient_codec
from acestep_consumer.broker.backoff import backoff
from acestep_consumer.broker.errors import BrokerError, BrokerRefused, ConnectionLost, describe, mapped
from acestep_consumer.broker.queue_limit import agree, limit_told
from acestep_consumer.broker.topology import CONTROL_LOG, Topology, declare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from aio_pika.abc import AbstractConnection
    from pydantic import SecretStr

    from acestep_consumer.broker.topology import Queue
    from acestep_consumer.config.settings import BrokerSettings

Step = Callable[[Channel], Awaitable[None]]
"""What must be done on every new channel. Raises a ``BrokerError`` when it cannot."""

# The event loop does nothing long, so a short heartbeat costs nothing: a dead peer is noticed after three of them.
HEARTBEAT_S = 10
CONNECT_TIMEOUT_S = 10.0
SET_UP_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 3.0
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
# A link that lives shorter than this has not recovered: the next wait goes on where the last one stopped.
SETTLED_S = 10.0
# A broker that stays away, for the same reason, is in the log so often.
REMINDER_S = 60.0
# Longer than a quorum queue takes to elect a leader.
RENEWED_AT_MOST_S = 30.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class BrokerConnection:
    """A connection to the broker that comes back.

    ``async with`` waits until it is up for the first time. Only then is a refusal an error; later ones are logged and
    tried again, because a broker that was good once can be good again.
    """

    def __init__(self, settings: BrokerSettings, name: str, *, with_stream: bool = True) -> None:
        """Take part in the settings' broker.

        Args:
            settings: where it is, and how much it may hold.
            name: what the broker lists the connection under.
            with_stream: declare the stream of cancellations too. After a crash of the broker a stream may be out of
                reach for a minute, and what does not need it shall not wait for it.
        """
        self._with_stream = with_stream
        self._urls = tuple(map(_with_heartbeat, settings.urls))
        # Each try takes the next node of the cluster: the one that was lost is the least likely to answer.
        self._turns = cycle(self._urls)
        self._url = self._urls[0]
        self._name = name
        self._settings = settings
        # As it stands on the broker, known from the first connect on.
        self._topology: Topology | None = None
        self._server_version: str | None = None
        self._steps: list[Step] = []
        self._on_loss: list[Callable[[], Awaitable[None]]] = []
        # Those calls while they run: the event loop itself holds tasks weakly.
        self._telling: set[asyncio.Future[None]] = set()
        self._connection: AbstractConnection | None = None
        self._channel: Channel | None = None
        self._up = asyncio.Event()
        self._up_since = 0.0
        # What was said last of a broker that is away, and from when on it is worth saying again.
        self._said, self._say_again = "", 0.0
        self._lost = asyncio.Event()
        self._loss = ""
        self._keeper: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether there is an open channel with everything declared and every step done."""
        return self._usable() is not None

    @property
    def server_version(self) -> str | None:
        """RabbitMQ's version such as ``3.10.8``, known from the first connect on; None where the broker tells none."""
        return self._server_version

    async def channel(self) -> Channel:
        """Return the open channel; wait for it while the link is down.

        It is the client library's lower layer: that one hands out properties exactly as they came, lets publishes
        pipeline, and costs half the work per message.
        """
        while (channel := self._usable()) is None:
            # The channel may be closed already and its callback still on the way.
            self._up.clear()
            await self._up.wait()
        return channel

    async def attach(self, step: Step) -> None:
        """Do ``step`` on this channel and on every one that follows.

        Raises:
            BrokerRefused: the broker does not allow it; it is not attached.
        """
        self._steps.append(step)
        if not self.is_up:
            return
        try:
            await step(await self.channel())
        except ConnectionLost:
            self.renew("a step could not be done")
        except BrokerRefused:
            self.detach(step)
            self.renew("a step was refused")
            raise

    def detach(self, step: Step) -> None:
        """Do not do ``step`` on later channels; harmless when repeated."""
        with suppress(ValueError):
            self._steps.remove(step)

    def on_loss(self, call: Callable[[], Awaitable[None]]) -> None:
        """Call this, in a task of its own, each time when a channel is gone and its deliveries with it."""
        self._on_loss.append(call)

    def renew(self, reason: str) -> None:
        """Drop the connection and make a new one."""
        if not self._lost.is_set():
            self._loss = reason
            self._up.clear()
            self._lost.set()

    def refused(self, at_most_s: float | None = None) -> None:
        """Note that the broker refused a publish on this channel; it is renewed then, unless it is new.

        A quorum queue without a leader refuses. RabbitMQ 3.10 goes on refusing for good on a channel that published to
        that queue for the first time just then, and takes everything on another one. A queue that is full refuses too,
        and for that one a new channel changes nothing: hence not at each refusal, but every ``at_most_s`` seconds.
        """
        if time.monotonic() - self._up_since > (RENEWED_AT_MOST_S if at_most_s is None else at_most_s):
            self.renew("the broker refuses publishes")

    async def declare_again(self) -> None:
        """Restore what somebody deleted, on the open channel. Raises ``BrokerError``."""
        if self._connection is None or self._topology is None:
            raise ConnectionLost("not connected")
        with mapped():
            async with asyncio.timeout(SET_UP_TIMEOUT_S), self._connection.channel() as channel:
                await declare(channel, self._topology)

    async def ensure(self, queue: str) -> None:
        """Declare everything again if this queue is not there. Raises ``BrokerError``."""
        if self._connection is None:
            raise ConnectionLost("not connected")
        try:
            with mapped():
                async with asyncio.timeout(SET_UP_TIMEOUT_S), self._connection.channel() as channel:
                    await channel.declare_queue(queue, passive=True)
        except BrokerError:  # not there; or the connection is lost, which shows at once
            await self.declare_again()

    async def stand(self, tier: str) -> None:
        """Declare the queue of a tier; the limit of one that stands stays.

        Raises:
            BrokerRefused: it stands with other settings. One that drops requests, or tells nobody, is none of ours.
            BrokerFault: it could not be declared.
        """
        if self._connection is None or self._topology is None:
            raise ConnectionLost("not connected")
        queue = self._topology.tier_queue(tier)
        try:
            await self._declare(self._connection, queue)
        except BrokerRefused as refusal:
            await self._declare(self._connection, queue.bounded_by(limit_told(refusal, queue.name)))

    @staticmethod
    async def _declare(connection: AbstractConnection, queue: Queue) -> None:
        with mapped():
            async with asyncio.timeout(SET_UP_TIMEOUT_S), connection.channel() as channel:
                await declare(channel, Topology((), (queue,), ()))

    async def __aenter__(self) -> Self:
        lenient_codec.install()
        if any(url.query.get("no_verify_ssl", "0") != "0" for url in self._urls):
            _log.warning("the broker's certificate is not verified: take no_verify_ssl out of ACESTEP_AMQP_URL")
        await self._connect(backoff(FIRST_WAIT_S, LONGEST_WAIT_S), first=True)
        self._keeper = asyncio.create_task(self._keep(), name=f"link {self._name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        await self._drop()

    def _usable(self) -> Channel | None:
        channel = self._channel
        return None if channel is None or channel.is_closed or self._lost.is_set() else channel

    async def _keep(self) -> None:
        waits = backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        while True:
            since = time.monotonic()
            await self._lost.wait()
            _log.warning("broker link lost, connecting again", link=self._name, reason=self._loss)
            await self._drop()
            self._tell_loss()
            if time.monotonic() - since > SETTLED_S:
                waits = backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
            await asyncio.sleep(next(waits))
            await self._connect(waits, first=False)

    def _tell_loss(self) -> None:
        for call in self._on_loss:
            task = asyncio.ensure_future(call())
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _connect(self, waits: Iterator[float], *, first: bool) -> None:
        """Try until the link is up. On the ``first`` connect, a refusal is raised."""
        for wait in waits:
            try:
                await self._open()
            except BrokerRefused as error:
                if first:
                    raise
                self._log_failure(error, wait)
            except BrokerError as error:
                self._log_failure(error, wait)
            except Exception:
                if first:
                    raise
                # This task is all that can bring the link back: it must outlive what nobody foresaw.
                _log.exception("broker link: unexpected error", link=self._name, wait_s=round(wait, 2))
            else:
                self._said = ""
                _log.info("broker link up", link=self._name, broker=self.address)
                return
            await asyncio.sleep(wait)

    def _log_failure(self, error: BrokerError, wait: float) -> None:
        """Say it once a minute, and when the reason is another one; a worker's links try for as long as it takes."""
        reason, now = describe(error), time.monotonic()
        news = reason != self._said or now >= self._say_again
        if news:
            self._said, self._say_again = reason, now + REMINDER_S
        (_log.warning if news else _log.debug)(
            "broker not reachable, trying again",
            link=self._name,
            broker=self.address,
            reason=reason,
            wait_s=round(wait, 2),
        )

    async def _open(self) -> None:
        self._url = next(self._turns)
        # Known before it is open: a connection that could not be opened wants to be closed too.
        self._connection = connection = Connection(self._url, client_properties={"connection_name": self._name})
        try:
            with mapped():
                await connection.connect(timeout=CONNECT_TIMEOUT_S)
                async with asyncio.timeout(SET_UP_TIMEOUT_S):
                    channel = await self._set_up(connection)
        except BaseException:
            await self._drop()
            raise
        self._use(channel)

    async def _set_up(self, connection: AbstractConnection) -> Channel:
        self._server_version = _version_of(connection)
        if self._topology is None:
            whole = await agree(connection, self._settings)
            self._topology = whole if self._with_stream else whole.without(CONTROL_LOG)
        # Unroutable publishes are silent by default.
        opened = await connection.channel(publisher_confirms=True, on_return_raises=True)
        await declare(opened, self._topology)
        channel = cast("Channel", await opened.get_underlay_channel())
        for step in self._steps:
            await step(channel)
        return channel

    def _use(self, channel: Channel) -> None:
        self._channel = channel
        self._up_since = time.monotonic()
        self._lost.clear()
        channel.closing.add_done_callback(lambda closing: self._on_closing(channel, closing))
        self._up.set()

    def _on_closing(self, channel: Channel, closing: asyncio.Future[object]) -> None:
        if channel is self._channel:
            error = None if closing.cancelled() else closing.exception()
            self.renew("closed" if error is None else describe(error))

    async def _drop(self) -> None:
        """Forget the channel and close the connection, as far as it can be closed."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is None:
            return
        with suppress(BrokerError), mapped():
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await connection.close()

    @property
    def address(self) -> str:
        """The URL of the node that it is connected to, or tried last, without user, password and query."""
        return str(self._url.with_user(None).with_query(None))


def _version_of(connection: AbstractConnection) -> str | None:
    transport = connection.transport
    told = transport.connection.server_properties.get("version") if transport else None
    return told if isinstance(told, str) else None


def _with_heartbeat(secret: SecretStr) -> URL:
    url = URL(secret.get_secret_value())
    return url if "heartbeat" in url.query else url.update_query(heartbeat=HEARTBEAT_S)
