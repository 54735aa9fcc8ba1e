# SPDX-License-Identifier: Apache-2.0
"""Ten thousand requests wait: a worker starts and works, and a client learns its place."""

import asyncio
import json
from pathlib import Path

import aio_pika
from pamqp.commands import Basic

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.topology import GENERATE, REQUESTS
from acestep_consumer.client import Client
from tests.support.broker import Peer, broker_settings, until
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

WAITING = 10_000


async def publish(url: str, prompt: str) -> None:
    """Publish so many requests; without confirms, which would take most of the test's time."""
    async with await aio_pika.connect(url) as connection:
        channel = await (await connection.channel(publisher_confirms=False)).get_underlay_channel()
        for number in range(WAITING):
            body = json.dumps({"prompt": prompt, "audio_format": "wav", "audio_duration": 10}).encode()
            properties = Basic.Properties(message_id=f"song-{number}")
            await channel.basic_publish(body, exchange=REQUESTS, routing_key="generate", properties=properties)


async def test_a_worker_starts_and_works_and_a_client_learns_its_place(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    url, never = service_environment["ACESTEP_AMQP_URL"], tmp_path / "never"
    settings = service_environment | {"ACESTEP_QUEUE_MAXSIZE": str(WAITING + 1), "ACESTEP_QUEUE_WORKERS": "1"}
    worker = WorkerProcess(tmp_path, settings, light=True)
    async with BrokerConnection(broker_settings(url, queue_maxsize=WAITING + 1), "declares"), Peer(url) as peer:

        async def all_wait() -> bool:
            return await peer.ready(GENERATE) == WAITING

        await peer.submit(task_id="first")
        await publish(url, f"until={never}")
        async with EventRecorder(url) as seen, running(worker), Client(url) as client:
            await eventually(lambda: "started" in seen.states("song-0"), WITHIN_S)
            assert [end.state for end in seen.terminal("first")] == ["completed"]
            estimate = await client.outlook(WITHIN_S)
            assert (estimate.position, estimate.in_hand, estimate.workers) == (WAITING - 1, 1, 1)
            await asyncio.to_thread(worker.kill)
            await until(all_wait, "the request that ran is back")
