# SPDX-License-Identifier: Apache-2.0
"""The broker closes the worker's connections under load, again and again: all jobs end once."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from acestep_consumer.broker.errors import BrokerRefused
from tests.support.scenario import scenario
from tests.support.servers import ManagementApi
from tests.support.waiting import WITHIN_S

JOBS = [f"song-{number}" for number in range(15)]
ROUNDS = 3


async def test_jobs_end_once_while_the_broker_closes_connections(
    service_environment: dict[str, str], amqp_vhost: str, management: ManagementApi, tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path, ACESTEP_QUEUE_WORKERS="3") as seen:
        for task_id in JOBS:
            await seen.peer.submit(task_id=task_id, prompt="takes=0.5")
        for number in range(1, ROUNDS + 1):
            await seen.ended(3 * number, JOBS)
            await asyncio.to_thread(close_the_workers, management, amqp_vhost)
        await seen.all_ended(*JOBS)
        await seen.assert_completed_once(*JOBS)
        await seen.assert_nothing_left()
    assert len(seen.worker.log_lines(event="broker connection lost, reconnecting")) >= ROUNDS


def close_the_workers(management: ManagementApi, vhost: str) -> None:
    """Close the worker's connections. The API knows them by name about a second after they came."""
    deadline = time.monotonic() + WITHIN_S
    while not (names := list(names_of_the_workers(management, vhost))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for name in names:
        with suppress(BrokerRefused):  # it has gone meanwhile
            management.call("DELETE", f"/api/connections/{quote(name, safe='')}")


def names_of_the_workers(management: ManagementApi, vhost: str) -> Iterator[str]:
    for connection in management.call("GET", f"/api/vhosts/{vhost}/connections"):
        if connection.get("client_properties", {}).get("connection_name", "").startswith("acestep-consumer"):
            yield connection["name"]
