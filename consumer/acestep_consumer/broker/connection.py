# SPDX-License-Identifier: Apache-2.0
"""One AMQP connection with one channel, kept alive.

Not aio-pika's robust connection: that one restores what it remembers, so a single object that cannot be restored
blocks all others, and it takes a queue's depth and existence from memory. Here every connect is a first connect:
connect, open the channel, declare the topology, run the attached steps. Whatever is lost (the connection, the channel,
a queue or the consumer), all is dropped and made again; there is one path to get right.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import cycle
from typing import TYPE_CHECKING, Self, cast

import structlog
from aiormq.channel import Channel
from yarl import URL

from acestep_consumer.broker import lenient_codec
from acestep_consumer.broker.backoff import backoff
from acestep_consumer.broker.channel_numbers import NumberedConnection, version_of
from acestep_consumer.broker.errors import (
    BrokerError,
    BrokerRefused,
    ConnectionLost,
    connecting,
    describe,
    end_within,
    mapped,
)
from acestep_consumer.broker.queue_limit import declared_limit, ensure_limit
from acestep_consumer.broker.topology import CONTROL_LOG, Topology, declare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aio_pika.abc import AbstractConnection
    from pydantic import SecretStr

    from acestep_consumer.broker.topology import Queue
    from acestep_consumer.config.settings import BrokerSettings

Step = Callable[[Channel], Awaitable[None]]
"""Sets up something on a new channel. Raises ``BrokerError`` when it cannot."""

# The event loop does nothing long, so a short heartbeat costs nothing: a dead peer is noticed after three of them.
HEARTBEAT_S = 10
CONNECT_TIMEOUT_S = 10.0
SET_UP_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 3.0
# For a connection without deliveries. Nothing is lost by not hearing the broker's answer, but its log has a warning.
UNUSED_CLOSE_TIMEOUT_S = 0.5
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
# A connection that is lost sooner than this has not recovered: its next wait continues the backoff.
SETTLED_S = 10.0
# How often the same reason for an unreachable broker is logged.
REMINDER_S = 60.0
# Longer than a quorum queue takes to elect a leader.
RECONNECT_INTERVAL_S = 30.0

log = structlog.get_logger()


class BrokerConnection:
    """A connection to the broker that is re-established after a loss.

    ``async with`` waits for the first connect. Only then is a refusal an error; later ones are logged and tried again,
    because a broker that accepted the connection once may do so again.
    """

    def __init__(self, settings: BrokerSettings, name: str, *, with_stream: bool = True) -> None:
        """Prepare a connection; entering it connects.

        Args:
            settings: the broker's URLs, and the limit and type of its queues.
            name: the connection's name on the broker.
            with_stream: declare the stream of cancellations too. After a crash of the broker a stream may be
                unavailable for a minute, and connections that do not need it shall not wait for it.
        """
        self._with_stream = with_stream
        self._urls = tuple(map(_with_heartbeat, settings.urls))
        # Each try takes the next node of the cluster: the one that was lost is the least likely to answer.
        self._next_urls = cycle(self._urls)
        self._url = self._urls[0]
        self._name = name
        self._settings = settings
        # As declared on the broker; None before the first connect.
        self._topology: Topology | None = None
        self._server_version: str | None = None
        self._steps: list[Step] = []
        self._on_loss: list[Callable[[], Awaitable[None]]] = []
        # Running calls of those; referenced here because the event loop holds tasks weakly.
        self._loss_calls: set[asyncio.Future[None]] = set()
        self._connection: AbstractConnection | None = None
        self._channel: Channel | None = None
        self._up = asyncio.Event()
        self._up_since = 0.0
        # The latest logged reason for an unreachable broker, and the time from which it is logged again.
        self._logged_reason, self._log_again_at = "", 0.0
        self._lost = asyncio.Event()
        self._loss_reason = ""
        self._keeper: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether there is an open channel with everything declared and every step done."""
        return self._usable() is not None

    @property
    def server_version(self) -> str | None:
        """RabbitMQ's version such as ``3.10.8``, known from the first connect on; None: not reported."""
        return self._server_version

    async def channel(self) -> Channel:
        """Return the open channel; wait for it while the connection is lost.

        It is aiormq's channel, not aio-pika's: that one hands out properties exactly as they came, lets publishes
        pipeline, and costs half the work per message.
        """
        while (channel := self._usable()) is None:
            # The channel may be closed already and its callback still pending.
            self._up.clear()
            await self._up.wait()
        return channel

    async def attach(self, step: Step) -> None:
        """Run ``step`` on this channel and on every later one.

        Raises:
            BrokerRefused: the broker does not allow it; it is not attached.
        """
        self._steps.append(step)
        if not self.is_up:
            return
        try:
            await step(await self.channel())
        except ConnectionLost:
            self.reconnect("a set-up step failed")
        except BrokerRefused:
            self.detach(step)
            self.reconnect("a set-up step was refused")
            raise

    def detach(self, step: Step) -> None:
        """Do not run ``step`` on later channels; harmless when repeated."""
        with suppress(ValueError):
            self._steps.remove(step)

    def on_loss(self, call: Callable[[], Awaitable[None]]) -> None:
        """Call this, in a task of its own, each time when a channel was lost and its deliveries with it."""
        self._on_loss.append(call)

    def reconnect(self, reason: str) -> None:
        """Drop the connection and make a new one."""
        if not self._lost.is_set():
            self._loss_reason = reason
            self._up.clear()
            self._lost.set()

    def publish_refused(self, at_most_every_s: float | None = None) -> None:
        """Reconnect because the broker refused a publish, unless the connection is newer than ``at_most_every_s``.

        A quorum queue without a leader refuses. RabbitMQ 3.10 then refuses for good on a channel that published to
        that queue for the first time just then, and accepts everything on another one. A full queue refuses too, and
        for that one a new channel changes nothing: hence not at each refusal.
        """
        interval_s = RECONNECT_INTERVAL_S if at_most_every_s is None else at_most_every_s
        if time.monotonic() - self._up_since > interval_s:
            self.reconnect("the broker refuses publishes")

    async def redeclare(self) -> None:
        """Declare everything again, since somebody deleted an object. Raises ``BrokerError``."""
        if self._connection is None or self._topology is None:
            raise ConnectionLost("not connected")
        with mapped():
            async with asyncio.timeout(SET_UP_TIMEOUT_S), self._connection.channel() as channel:
                await declare(channel, self._topology)

    async def ensure_queue(self, queue: str) -> None:
        """Declare everything again if this queue does not exist. Raises ``BrokerError``."""
        if self._connection is None:
            raise ConnectionLost("not connected")
        try:
            with mapped():
                async with asyncio.timeout(SET_UP_TIMEOUT_S), self._connection.channel() as channel:
                    await channel.declare_queue(queue, passive=True)
        except BrokerError:  # it does not exist; or the connection is lost, which shows at once
            await self.redeclare()

    async def declare_tier_queue(self, tier: str) -> None:
        """Declare the queue of a tier; an existing one keeps its limit.

        Raises:
            BrokerRefused: it exists with other settings, under which it might drop requests unnoticed.
            BrokerError: it could not be declared.
        """
        if self._connection is None or self._topology is None:
            raise ConnectionLost("not connected")
        queue = self._topology.tier_queue(tier)
        try:
            await self._declare(self._connection, queue)
        except BrokerRefused as refusal:
            await self._declare(self._connection, queue.with_limit(declared_limit(refusal, queue.name)))

    @staticmethod
    async def _declare(connection: AbstractConnection, queue: Queue) -> None:
        with mapped():
            async with asyncio.timeout(SET_UP_TIMEOUT_S), connection.channel() as channel:
                await declare(channel, Topology((), (queue,), ()))

    async def __aenter__(self) -> Self:
        lenient_codec.install()
        await self._connect(backoff(FIRST_WAIT_S, LONGEST_WAIT_S), first=True)
        self._keeper = asyncio.create_task(self._keep(), name=f"connection {self._name}")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close(CLOSE_TIMEOUT_S)

    async def close(self, timeout_s: float) -> None:
        """Close it for good, and wait so long for the broker's answer; harmless when repeated."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        await self._drop(timeout_s)

    def _usable(self) -> Channel | None:
        channel = self._channel
        return None if channel is None or channel.is_closed or self._lost.is_set() else channel

    async def _keep(self) -> None:
        """Connect again after each loss, for as long as this task runs."""
        waits = backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        while True:
            since = time.monotonic()
            await self._lost.wait()
            log.warning("broker connection lost, reconnecting", connection=self._name, reason=self._loss_reason)
            await self._drop()
            self._call_on_loss()
            if time.monotonic() - since > SETTLED_S:
                waits = backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
            await asyncio.sleep(next(waits))
            await self._connect(waits, first=False)

    def _call_on_loss(self) -> None:
        for call in self._on_loss:
            task = asyncio.ensure_future(call())
            self._loss_calls.add(task)
            task.add_done_callback(self._loss_calls.discard)

    async def _connect(self, waits: Iterator[float], *, first: bool) -> None:
        """Try until the connection is up. On the ``first`` connect, a refusal is raised."""
        for wait_s in waits:
            try:
                await self._open()
            except BrokerRefused as error:
                if first:
                    raise
                self._log_failure(error, wait_s)
            except BrokerError as error:
                self._log_failure(error, wait_s)
            except Exception:
                if first:
                    raise
                # Nothing but this task can reconnect: it must survive unforeseen errors.
                log.exception("broker connection: unexpected error", connection=self._name, wait_s=round(wait_s, 2))
            else:
                self._logged_reason = ""
                log.info("broker connected", connection=self._name, broker=self.address)
                return
            await asyncio.sleep(wait_s)

    def _log_failure(self, error: BrokerError, wait_s: float) -> None:
        """Log a warning once a minute, and when the reason changes: workers retry for as long as it takes."""
        reason, now = describe(error), time.monotonic()
        is_news = reason != self._logged_reason or now >= self._log_again_at
        if is_news:
            self._logged_reason, self._log_again_at = reason, now + REMINDER_S
        (log.warning if is_news else log.debug)(
            "broker not reachable, trying again",
            connection=self._name,
            broker=self.address,
            reason=reason,
            wait_s=round(wait_s, 2),
        )

    async def _open(self) -> None:
        self._url = next(self._next_urls)
        # Not after the set-up: a new connection may be asked for during it, as when the broker cancels a consumer.
        self._lost.clear()
        # Stored before it is open: a connection that could not be opened has to be closed too.
        self._connection = connection = NumberedConnection(self._url, client_properties={"connection_name": self._name})
        try:
            with connecting(CONNECT_TIMEOUT_S):
                await connection.connect(timeout=CONNECT_TIMEOUT_S)
            with mapped():
                async with asyncio.timeout(SET_UP_TIMEOUT_S):
                    channel = await self._set_up(connection)
        except BaseException:
            await self._drop(UNUSED_CLOSE_TIMEOUT_S)
            raise
        self._use(channel)

    async def _set_up(self, connection: AbstractConnection) -> Channel:
        self._server_version = version_of(connection)
        if self._topology is None:
            whole = await ensure_limit(connection, self._settings)
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
        channel.closing.add_done_callback(lambda closing: self._on_closing(channel, closing))
        self._up.set()

    def _on_closing(self, channel: Channel, closing: asyncio.Future[object]) -> None:
        if channel is self._channel:
            error = None if closing.cancelled() else closing.exception()
            self.reconnect("closed" if error is None else describe(error))

    async def _drop(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Forget the channel and close the connection, as far as it can be closed."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is None:
            return
        try:
            await end_within(timeout_s, connection.close())
        except Exception:
            log.exception("broker connection: unexpected error while closing", connection=self._name)

    @property
    def address(self) -> str:
        """The URL of the node that it is connected to, or tried last, without user, password and query."""
        return str(self._url.with_user(None).with_query(None))


def _with_heartbeat(secret: SecretStr) -> URL:
    url = URL(secret.get_secret_value())
    return url if "heartbeat" in url.query else url.update_query(heartbeat=HEARTBEAT_S)
