# SPDX-License-Identifier: Apache-2.0
"""The chore as a taskiq task on taskiq-aio-pika. Its messages are in taskiq's own form; see ``wrapped``."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import suppress
from typing import Any

from taskiq.acks import AcknowledgeType
from taskiq.api import run_receiver_task
from taskiq_aio_pika import AioPikaBroker, Exchange, Queue

from acestep_consumer.broker.topology import DEAD_LETTER, EVENTS, GENERATE, REQUESTS
from acestep_consumer.config.settings import Settings
from tests.bench.arena import TASK, settings_for
from tests.bench.chore import Chore, Notice
from tests.bench.contenders.bare_aio_pika import event_of
from tests.bench.throughput import ThroughputMeter


async def main(settings: Settings, chore: Chore, messages: int) -> None:
    """Consume until ``messages`` are acked."""
    meter = ThroughputMeter(messages)
    logging.getLogger("taskiq").setLevel(logging.ERROR)  # by default it logs every message
    prefetch = settings.broker.workers_at_start
    broker = AioPikaBroker(
        settings.broker.url.get_secret_value(),
        qos=prefetch,
        exchange=Exchange(name=REQUESTS, declare=False),
        task_queues=[Queue(name=GENERATE, declare=False)],
        dead_letter_queue=Queue(name=DEAD_LETTER, declare=False),
    )
    broker.is_worker_process = True
    await broker.startup()
    assert broker.write_channel is not None
    events = await broker.write_channel.get_exchange(EVENTS)

    async def publish(notice: Notice) -> None:
        await events.publish(event_of(notice), notice.routing_key)

    async def generate(request: dict[str, Any]) -> None:
        await chore.perform(request, publish)

    broker.register_task(generate, task_name=TASK)
    receiver = asyncio.create_task(
        run_receiver_task(broker, max_async_tasks=prefetch, ack_time=AcknowledgeType.WHEN_EXECUTED)
    )
    (await meter.result()).print_json()
    receiver.cancel()
    with suppress(asyncio.CancelledError):
        await receiver
    await broker.shutdown()


if __name__ == "__main__":
    SETTINGS = settings_for(int(sys.argv[1]))
    asyncio.run(main(SETTINGS, Chore(SETTINGS), int(sys.argv[2])))
