# SPDX-License-Identifier: Apache-2.0
"""S3 goes away under running jobs, and comes back: no job fails of it, nothing new is taken, nothing is done twice."""

import asyncio
from pathlib import Path

from acestep_consumer.client import Client
from acestep_schemas.events import JobCompleted, WorkerEvent
from tests.support.broker import Peer
from tests.support.proxy import Proxy
from tests.support.waiting import eventually
from tests.support.worker import WorkerProcess, running

SONG = {"prompt": "x", "audio_duration": 10, "inference_steps": 1, "audio_format": "wav"}
RUNNING, LATER = 2, 3


async def test_jobs_wait_for_storage_and_are_done_when_it_is_back(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    url = own_worker_environment["ACESTEP_AMQP_URL"]
    async with Proxy.for_url(own_worker_environment["ACESTEP_S3_ENDPOINT"]) as proxy:
        through = {"ACESTEP_S3_ENDPOINT": f"http://127.0.0.1:{proxy.port}", "ACESTEP_QUEUE_WORKERS": "4"}
        async with (
            running(WorkerProcess(tmp_path, own_worker_environment | through)) as worker,
            Client(url) as client,
            client.subscribe("job.#") as events,
            Peer(url) as peer,
        ):
            proxy.refuse()
            for number in range(RUNNING):
                await client.submit({**SONG, "task_id": f"waits-{number}"})
            await eventually(lambda: "storage is unavailable" in worker.log.read_text())
            for number in range(LATER):
                await client.submit({**SONG, "task_id": f"waits-{RUNNING + number}"})
            # Two of four places are free, and still nothing is taken.
            for _ in range(10):
                assert await peer.ready("acestep.generate") == LATER
                await asyncio.sleep(0.1)
            status, _ = await asyncio.to_thread(worker.get, "/readyz")
            assert status == 503
            proxy.heal()
            ended = []
            async for event in events:
                assert not isinstance(event, WorkerEvent)
                ended += [event] if event.terminal else []
                if len(ended) == RUNNING + LATER:
                    break
    assert all(isinstance(event, JobCompleted) for event in ended)
    assert len({event.subject for event in ended}) == RUNNING + LATER
    assert worker.log_lines(event="storage is available again")
