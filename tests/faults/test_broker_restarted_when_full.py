# SPDX-License-Identifier: Apache-2.0
"""The broker restarts while its queue is full and workers run more: what came back over the limit is done."""

import asyncio
from pathlib import Path

from infra.local.rabbitmq import RabbitMQ
from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

LIMIT, RUNNING = 4, 2


async def test_unacknowledged_requests_are_not_given_up_by_a_broker_that_restarts_with_a_full_queue(
    own_rabbitmq: RabbitMQ, service_environment: dict[str, str], tmp_path: Path
) -> None:
    go, url = tmp_path / "go", own_rabbitmq.amqp_url
    environment = service_environment | {
        "ACESTEP_AMQP_URL": url,
        "ACESTEP_QUEUE_MAXSIZE": str(LIMIT),
        "ACESTEP_QUEUE_WORKERS": str(RUNNING),
    }
    held = [f"held-{number}" for number in range(RUNNING)]
    waiting = [f"waiting-{number}" for number in range(LIMIT)]
    async with running(WorkerProcess(tmp_path, environment, light=True)) as worker, EventRecorder(url) as recorder:
        async with Peer(url) as peer:
            for task_id in held:
                await peer.submit(task_id=task_id, prompt=f"until={go}")
            await eventually(lambda: all("started" in recorder.states(task_id) for task_id in held), WITHIN_S)
            for task_id in waiting:
                await peer.submit(task_id=task_id)
            await asyncio.to_thread(own_rabbitmq.kill)
        # A classic queue that comes up with more than its limit gives up the oldest: those that were unacknowledged.
        await asyncio.to_thread(own_rabbitmq.start)
        await eventually(lambda: worker.get("/readyz")[0] == 200, WITHIN_S)
        go.touch()
        await eventually(lambda: all(map(recorder.terminal, (*held, *waiting))), WITHIN_S)
    ends = {event.state for task_id in (*held, *waiting) for event in recorder.terminal(task_id)}
    assert ends == {"completed"}
