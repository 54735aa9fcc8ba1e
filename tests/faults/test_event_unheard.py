# SPDX-License-Identifier: Apache-2.0
"""Nobody is bound to hear an event: it is kept, it is no error, and the job is over."""

import json
from pathlib import Path

from acestep_consumer.broker.topology import GENERATE, UNROUTED
from tests.support.broker import Peer
from tests.support.worker import WorkerProcess, running


async def test_an_event_that_nobody_hears_is_kept_and_holds_nothing_up(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with (
        running(WorkerProcess(tmp_path, service_environment, light=True)) as worker,
        Peer(service_environment["ACESTEP_AMQP_URL"]) as peer,
    ):
        for task_id in ("song", "next"):
            await peer.submit(task_id=task_id)
        kept = []
        while (event := json.loads((await peer.take(UNROUTED)).body))["subject"] != "next" or (
            event["type"] != "acestep.job.completed.v1"
        ):
            kept.append((event["subject"], event["type"]))
        assert ("song", "acestep.job.completed.v1") in kept
        assert await peer.ready(GENERATE) == 0
    assert worker.log_lines(event="event dropped") == []
    assert worker.log_lines(level="error") == []
