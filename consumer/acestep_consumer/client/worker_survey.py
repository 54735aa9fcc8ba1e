# SPDX-License-Identifier: Apache-2.0
"""Asks the workers to announce themselves, and hears them out. On channels of its own: a refusal disturbs nobody."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final
from uuid import uuid4

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from pydantic import ValidationError

from acestep_consumer.broker.topology import CONTROL, EVENTS
from acestep_consumer.client.connection import ClientConnection, checked, close_quietly
from acestep_consumer.client.subscription import PREFIX
from acestep_schemas.events import Worker, WorkerEvent, parse_event

QUESTION: Final = "status"
ANSWERS: Final = "worker.#"
# All hear the question at once, so all answers come together. Workers may be fewer than consumers: one that changes its
# prefetch has several.
STRAGGLE_S: Final = 0.3

_log: Final = logging.getLogger("acestep_consumer.client")


async def muster(
    line: ClientConnection, answers: dict[str, Worker], wanted: int, listener: Callable[[WorkerEvent], None]
) -> None:
    """Put what each worker says into ``answers``, by its id: until ``wanted`` are ready, or nobody follows the last.

    Whoever calls sets the limit: the first answer is waited for. They come within milliseconds, or a second after the
    last ones.

    Args:
        line: the connection.
        answers: filled as they come, so that those are there when the time is over.
        wanted: how many there should be; 0 returns at once.
        listener: called with each answer.

    Raises:
        BrokerFault: this login may not hear or ask them, or the connection was lost.
    """
    if not wanted:
        return
    ear = await line.channel()
    try:
        arrived = await _listen(ear)
        await line.ask(CONTROL, QUESTION)
        while sum(worker.state == "ready" for worker in answers.values()) < wanted:
            event = _read(await asyncio.wait_for(arrived.get(), STRAGGLE_S if answers else None))
            if event is not None:
                answers[event.data.worker_id] = event.data
                listener(event)
    except TimeoutError:
        pass  # these are all that there are
    finally:
        await close_quietly(ear)


async def _listen(channel: AbstractChannel) -> asyncio.Queue[AbstractIncomingMessage]:
    """Consume a queue that goes with the channel."""
    arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
    with checked():
        queue = await channel.declare_queue(PREFIX + uuid4().hex, exclusive=True, auto_delete=True)
        await queue.bind(EVENTS, ANSWERS)
        await queue.consume(arrived.put, no_ack=True)
    return arrived


def _read(message: AbstractIncomingMessage) -> WorkerEvent | None:
    try:
        event = parse_event(message.body)
    except ValidationError as error:
        _log.warning("skipped a message that is no known event: %s", error.errors(include_url=False)[0]["msg"])
        return None
    return event if isinstance(event, WorkerEvent) else None
