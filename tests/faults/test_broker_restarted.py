# SPDX-License-Identifier: Apache-2.0
"""The broker restarts under load, in good order or after a power cut: all that it had confirmed is done, once."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.local.rabbitmq import RabbitMQ
from infra.local.s3 import SeaweedFS
from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.object_store import ObjectStore
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

JOBS = [f"song-{number}" for number in range(12)]


@pytest.mark.parametrize(
    ("end", "queue_type"),
    [(RabbitMQ.kill, "classic"), (RabbitMQ.stop, "quorum")],
    ids=["power cut, classic", "in good order, quorum"],
)
async def test_confirmed_requests_outlive_the_broker(
    end: Callable[[RabbitMQ], None],
    queue_type: str,
    own_rabbitmq: RabbitMQ,
    s3: SeaweedFS,
    s3_prefix: str,
    service_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    environment = service_environment | {
        "ACESTEP_AMQP_URL": own_rabbitmq.amqp_url,
        "ACESTEP_QUEUE_TYPE": queue_type,
        "ACESTEP_QUEUE_WORKERS": "4",
    }
    async with (
        running(WorkerProcess(tmp_path, environment, light=True)) as worker,
        EventRecorder(own_rabbitmq.amqp_url) as recorder,
    ):
        async with Peer(own_rabbitmq.amqp_url) as peer:
            for task_id in JOBS:
                await peer.submit(task_id=task_id, prompt="takes=0.6")
            await eventually(lambda: any(map(recorder.terminal, JOBS)), WITHIN_S)
            # Four are running and most of the others wait when it goes down.
            await asyncio.to_thread(end, own_rabbitmq)
        assert not all(map(recorder.terminal, JOBS))
        await asyncio.to_thread(own_rabbitmq.start)
        await eventually(lambda: all(map(recorder.terminal, JOBS)), WITHIN_S)
        await eventually(lambda: worker.get("/readyz")[0] == 200, WITHIN_S)
    async with Peer(own_rabbitmq.amqp_url) as peer:
        assert await peer.ready("acestep.generate") == 0
    object_store = ObjectStore.of(environment)
    for task_id in JOBS:
        told = recorder.terminal(task_id)
        assert {event.state for event in told} == {"completed"}
        assert len({event.body for event in told}) == 1
        assert await object_store.wrongs(told[0].data) == []
