# SPDX-License-Identifier: Apache-2.0
"""The chore as a FastStream application."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from faststream.rabbit import Channel, ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue

from acestep_consumer.broker.topology import EVENTS, GENERATE
from acestep_consumer.config.settings import Settings
from tests.bench.arena import settings_for
from tests.bench.chore import Chore, Notice
from tests.bench.throughput import ThroughputMeter


async def main(settings: Settings, chore: Chore, messages: int) -> None:
    """Consume until ``messages`` are acked."""
    meter = ThroughputMeter(messages)
    broker = RabbitBroker(
        settings.broker.url.get_secret_value(),
        default_channel=Channel(prefetch_count=settings.broker.workers_at_start, on_return_raises=True),
        logger=None,  # by default it logs every message twice
    )
    events = RabbitExchange(EVENTS, type=ExchangeType.TOPIC, declare=False)

    async def publish(notice: Notice) -> None:
        await broker.publish(
            notice.body,
            exchange=events,
            routing_key=notice.routing_key,
            persist=notice.persistent,
            content_type=notice.content_type,
            message_id=notice.message_id,
            message_type=notice.type,
        )

    async def generate(request: dict[str, Any]) -> None:
        await chore.perform(request, publish)

    # Called, not used as a decorator; by default it acks when the function returns and rejects when it raises.
    broker.subscriber(RabbitQueue(GENERATE, declare=False), no_reply=True)(generate)
    async with broker:
        await broker.start()
        (await meter.result()).print_json()


if __name__ == "__main__":
    SETTINGS = settings_for(int(sys.argv[1]))
    asyncio.run(main(SETTINGS, Chore(SETTINGS), int(sys.argv[2])))
