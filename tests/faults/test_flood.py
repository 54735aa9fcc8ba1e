# SPDX-License-Identifier: Apache-2.0
"""Ten times as many requests as there is room for, all at once: exactly the room is filled, the rest is refused.

On a quorum queue the limit holds for what comes after the burst; how far the burst overshot is in the JUnit report.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from aio_pika.exceptions import DeliveryError

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.topology import GENERATE
from tests.support.broker import Peer, broker_settings
from tests.support.scenario import scenario
from tests.support.waiting import WITHIN_S, eventually

LIMIT, RUNNING = 40, 4
FLOOD = 10 * LIMIT


async def accepted_of(peer: Peer, task_ids: list[str], prompt: str = "x") -> list[str]:
    """Publish all at once; return those that the broker confirmed."""

    async def submit(task_id: str) -> str | None:
        try:
            await peer.submit(task_id=task_id, prompt=prompt)
        except DeliveryError:
            return None
        return task_id

    answers = await asyncio.gather(*map(submit, task_ids))
    return [task_id for task_id in answers if task_id is not None]


@pytest.mark.broker_versions
@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_without_a_worker_the_limit_is_what_is_accepted(
    queue_type: str, amqp_url: str, record_testsuite_property: Callable[[str, object], None]
) -> None:
    settings = broker_settings(amqp_url, queue_type=queue_type, queue_maxsize=LIMIT)
    async with BrokerConnection(settings, "declares"), Peer(amqp_url) as peer:
        accepted = await accepted_of(peer, [f"song-{number}" for number in range(FLOOD)])
        assert await peer.ready(GENERATE) == len(accepted)
        # Full is full: what comes after the flood is refused.
        assert await accepted_of(peer, ["late"]) == []
    record_testsuite_property(f"overshoot of a {queue_type} queue", len(accepted) - LIMIT)
    if queue_type == "classic":
        assert len(accepted) == LIMIT
    else:
        # A quorum queue learns of its length a little late. A burst overshoots, all of it on a machine that is busy.
        assert len(accepted) >= LIMIT


async def test_with_a_worker_the_limit_and_its_prefetch_are_what_is_accepted_and_all_of_it_is_done(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    variables = {"ACESTEP_QUEUE_MAXSIZE": str(LIMIT), "ACESTEP_QUEUE_WORKERS": str(RUNNING)}
    async with scenario(service_environment, tmp_path, **variables) as seen:
        first = [f"first-{number}" for number in range(RUNNING)]
        assert await accepted_of(seen.peer, first, f"until={go}") == first
        await eventually(lambda: all("started" in seen.recorder.states(task_id) for task_id in first), WITHIN_S)
        accepted = await accepted_of(seen.peer, [f"song-{number}" for number in range(FLOOD)], f"until={go}")
        assert len(accepted) == LIMIT
        go.touch()
        await seen.all_ended(*first, *accepted)
        await seen.assert_completed_once(*first, *accepted)
        await seen.assert_nothing_left()
    assert {event.task_id for event in seen.recorder.events} == {*first, *accepted}
