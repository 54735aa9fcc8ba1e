# SPDX-License-Identifier: Apache-2.0
"""Broker and storage are away: ``/readyz`` says so, and at once, for probes wait a few seconds at most."""

import asyncio
import time
from functools import partial
from pathlib import Path
from statistics import median

from tests.support.broker import until
from tests.support.proxy import Proxy
from tests.support.waiting import WITHIN_S
from tests.support.worker import WorkerProcess, running


async def test_readiness_is_answered_at_once_with_the_broker_and_the_storage_away(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    url, endpoint = own_worker_environment["ACESTEP_AMQP_URL"], own_worker_environment["ACESTEP_S3_ENDPOINT"]
    async with Proxy.for_url(url) as amqp, Proxy.for_url(endpoint) as s3:
        through = {"ACESTEP_AMQP_URL": amqp.url(url), "ACESTEP_S3_ENDPOINT": f"http://127.0.0.1:{s3.port}"}
        async with running(WorkerProcess(tmp_path, own_worker_environment | through, light=True)) as worker:
            took_s: list[float] = []

            async def reached(*, reachable: bool) -> bool:
                """Whether this is the verdict on both."""
                began = time.monotonic()
                status, body = await asyncio.to_thread(worker.get, "/readyz")
                took_s.append(time.monotonic() - began)
                assert status == (200 if all(body["checks"].values()) else 503)
                return bool(body["checks"] == {"broker": reachable, "storage": reachable, "models": True, "disk": True})

            assert await reached(reachable=True)
            amqp.refuse()
            s3.refuse()
            await until(partial(reached, reachable=False), "the outage is known", WITHIN_S)
            for _ in range(10):
                assert await reached(reachable=False)
            amqp.heal()
            s3.heal()
            await until(partial(reached, reachable=True), "it is over", WITHIN_S)
    # A question to a server that is away takes longer each time; a busy machine, now and then.
    assert median(took_s) < 0.2
