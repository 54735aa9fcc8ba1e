# SPDX-License-Identifier: Apache-2.0
"""A consumer written straight on aio-pika: no more than the chore, done carefully."""

from __future__ import annotations

import asyncio
import json
import sys

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from acestep_consumer.broker.topology import EVENTS, GENERATE
from acestep_consumer.config.settings import Settings
from tests.bench.arena import settings_for
from tests.bench.chore import Chore, Notice
from tests.bench.throughput import ThroughputMeter


def event_of(notice: Notice) -> aio_pika.Message:
    """Return the event as a message."""
    modes = aio_pika.DeliveryMode
    return aio_pika.Message(
        notice.body,
        content_type=notice.content_type,
        delivery_mode=modes.PERSISTENT if notice.persistent else modes.NOT_PERSISTENT,
        message_id=notice.message_id,
        type=notice.type,
    )


async def main(settings: Settings, chore: Chore, messages: int) -> None:
    """Consume until ``messages`` are acked."""
    meter = ThroughputMeter(messages)
    connection = await aio_pika.connect_robust(settings.broker.url.get_secret_value())
    async with connection:
        publishing = await connection.channel(on_return_raises=True)
        events = await publishing.get_exchange(EVENTS)
        consuming = await connection.channel()
        await consuming.set_qos(prefetch_count=settings.broker.workers_at_start)
        queue = await consuming.declare_queue(GENERATE, passive=True)

        async def publish(notice: Notice) -> None:
            await events.publish(event_of(notice), notice.routing_key)

        async def on_message(message: AbstractIncomingMessage) -> None:
            try:
                await chore.perform(json.loads(message.body), publish)
            except Exception:
                await message.reject(requeue=True)
                raise
            await message.ack()

        await queue.consume(on_message)
        (await meter.result()).print_json()


if __name__ == "__main__":
    SETTINGS = settings_for(int(sys.argv[1]))
    asyncio.run(main(SETTINGS, Chore(SETTINGS), int(sys.argv[2])))
