# SPDX-License-Identifier: Apache-2.0
"""Asks the workers to announce themselves and collects the answers, on channels of its own: a refusal closes them."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final
from uuid import uuid4

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from acestep_consumer.broker.topology import EVENTS
from acestep_consumer.client.connection import ClientConnection, checked, close_quietly
from acestep_consumer.client.subscription import PREFIX, known_event
from acestep_schemas.events import Worker, WorkerEvent

ANSWERS: Final = "worker.#"
# All workers get the request at once, so all answers come together. There may be fewer workers than consumers: one that
# changes its prefetch has several.
LAST_ANSWER_S: Final = 0.3

# Fields that a newer worker added are ignored.
_log: Final = logging.getLogger("acestep_consumer.client")


async def survey_workers(
    connection: ClientConnection,
    answers: dict[str, Worker],
    expected: int,
    on_answer: Callable[[WorkerEvent], None],
) -> None:
    """Put each worker's answer into ``answers``, by its id: until ``expected`` are ready, or no more answers come.

    The caller sets the time limit: the first answer is waited for. Answers come within milliseconds, or a second after
    the previous ones.

    Args:
        connection: the connection to ask over.
        answers: filled as answers come, so that they are there when the caller's time is over.
        expected: how many workers there should be; 0 returns at once.
        on_answer: called with each answer.

    Raises:
        BrokerError: this login may not ask or listen, or the connection was lost.
    """
    if not expected:
        return
    channel = await connection.channel()
    try:
        arrived = await _consume_answers(channel)
        await connection.request_statuses()
        while sum(worker.state == "ready" for worker in answers.values()) < expected:
            async with asyncio.timeout(LAST_ANSWER_S if answers else None):
                event = _parsed(await arrived.get())
            if event is not None:
                answers[event.data.worker_id] = event.data
                on_answer(event)
    except TimeoutError:
        pass  # there are no more
    finally:
        await close_quietly(channel)


async def _consume_answers(channel: AbstractChannel) -> asyncio.Queue[AbstractIncomingMessage]:
    """Consume a queue that is deleted with the channel."""
    arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
    with checked():
        queue = await channel.declare_queue(PREFIX + uuid4().hex, exclusive=True, auto_delete=True)
        await queue.bind(EVENTS, ANSWERS)
        await queue.consume(arrived.put, no_ack=True)
    return arrived


def _parsed(message: AbstractIncomingMessage) -> WorkerEvent | None:
    event = known_event(message.body)
    return event if isinstance(event, WorkerEvent) else None
