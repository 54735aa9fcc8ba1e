# SPDX-License-Identifier: Apache-2.0
"""For programs that want songs: submit a request, hear its events. Needs the base install only.

>>> async with Client("amqp://…") as client:
...     async with client.subscribe(f"job.*.{task_id}") as events:
...         await client.submit({"task_id": task_id, "prompt": "jazz"})
...         async for event in events: ...
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Self
from uuid import uuid4

import aio_pika
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity, DeliveryError, PublishError

from schemas.events import JobEvent, WorkerEvent, parse_event

REQUESTS, EVENTS, ROUTING_KEY = "acestep.requests", "acestep.events", "generate"
TIMEOUT_S = 30.0


class ClientError(Exception):
    """The broker did not take the request; the text says why and what to do."""


class QueueFull(ClientError):
    """The queue holds as many requests as it may; nothing was accepted. Try again later."""


class NoQueue(ClientError):
    """Nobody has declared the request queue yet."""


class Unreachable(ClientError):
    """The broker cannot be reached or refuses the login."""


class Client:
    """A connection to the broker for one producer or subscriber. Use as an async context manager."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: AbstractConnection | None = None

    async def __aenter__(self) -> Self:
        try:
            self._connection = await aio_pika.connect(self._url, timeout=TIMEOUT_S)
        except (AMQPError, OSError) as error:
            raise Unreachable(f"no connection to the broker: {_words(error)}; check ACESTEP_AMQP_URL") from error
        self._publishing = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def submit(
        self,
        request: Mapping[str, object],
        *,
        priority: int = 0,
        correlation_id: str | None = None,
        reply_to: str | None = None,
        expiration_s: float | None = None,
    ) -> str:
        """Publish one request and wait for the broker's confirm. Returns its task id.

        Raises:
            QueueFull: the broker refused it.
            NoQueue: no worker has declared the topology yet.
            Unreachable: the connection was lost; whether the request was taken is unknown, and sending the same
                task id again is safe.
        """
        task_id = str(request.get("task_id") or uuid4())
        message = aio_pika.Message(
            json.dumps({**request, "task_id": task_id}).encode(),
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=task_id,
            correlation_id=correlation_id,
            reply_to=reply_to,
            priority=priority,
            expiration=expiration_s,
            timestamp=datetime.now(UTC),
        )
        await self._publish(message)
        return task_id

    async def _publish(self, message: aio_pika.Message) -> None:
        try:
            exchange = await self._publishing.get_exchange(REQUESTS, ensure=False)
            await exchange.publish(message, ROUTING_KEY, timeout=TIMEOUT_S)
        except (PublishError, ChannelNotFoundEntity) as error:
            raise NoQueue(
                "no queue takes requests yet: start a worker, or run `acestep-consumer topology --declare`"
            ) from error
        except DeliveryError as error:
            raise QueueFull("the queue is full: the request was not accepted; try again later") from error
        except (AMQPError, OSError, RuntimeError) as error:
            raise Unreachable(f"the connection was lost before the confirm: {_words(error)}") from error

    @asynccontextmanager
    async def subscribe(self, *routing_keys: str) -> AsyncIterator[AsyncIterator[JobEvent | WorkerEvent]]:
        """Hear events whose routing key matches, from now on; ``job.#`` hears all jobs.

        Subscribe before submitting, so that no event is missed. Raises ``NoQueue`` when the topology is not declared.
        """
        if self._connection is None:
            raise Unreachable("not connected: use `async with Client(url) as client`")
        channel = await self._connection.channel()
        try:
            queue = await channel.declare_queue(exclusive=True, auto_delete=True)
            for key in routing_keys:
                await queue.bind(EVENTS, key)
            yield _events(queue)
        except ChannelNotFoundEntity as error:
            raise NoQueue("no events yet: start a worker, or run `acestep-consumer topology --declare`") from error
        finally:
            if not channel.is_closed:
                await channel.close()


async def _events(queue: aio_pika.abc.AbstractQueue) -> AsyncIterator[JobEvent | WorkerEvent]:
    async with queue.iterator(no_ack=True) as messages:
        async for message in messages:
            yield parse_event(message.body)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
