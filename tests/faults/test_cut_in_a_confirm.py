# SPDX-License-Identifier: Apache-2.0
"""The connection breaks when half of a confirm has reached the worker: was the event heard or not? It is told again."""

import asyncio
import itertools
from contextlib import suppress
from pathlib import Path

from acestep_consumer.broker.topology import DEAD_LETTER
from tests.support.proxy import Direction, Where
from tests.support.scenario import PUBLISHING, Scenario, manifest_of, scenario
from tests.support.waiting import WITHIN_S, eventually

# The frame of a confirm has 21.
HALF_A_CONFIRM = 10
SOON_S = 20


async def test_an_event_whose_confirm_is_lost_is_told_again_in_the_same_words(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path) as seen:
        async with asyncio.timeout(WITHIN_S):
            numbers = itertools.count()
            # On a slow machine the confirm that is cut may be that of the progress before: then once more.
            while not await told_twice(seen, f"song-{next(numbers)}"):
                pass
        await seen.assert_nothing_left()
        assert await seen.peer.ready(DEAD_LETTER) == 0
    assert not seen.worker.log_lines(event="handler failed")


async def told_twice(seen: Scenario, task_id: str) -> bool:
    """Cut the next confirm while a job's manifest is written. Returns whether its terminal event was told again."""
    with seen.s3.hold(manifest_of(task_id, "PUT")) as hold:
        await seen.peer.submit(task_id=task_id, batch_size=2)
        await eventually(lambda: hold.waiting, WITHIN_S)
        connected = seen.amqp.accepted
        seen.amqp.drop_after(HALF_A_CONFIRM, Where(Direction.DOWN, PUBLISHING))
    await eventually(lambda: seen.recorder.terminal(task_id) and seen.amqp.accepted == connected + 1, WITHIN_S)
    with suppress(AssertionError):
        await eventually(lambda: len(seen.recorder.terminal(task_id)) > 1, SOON_S)
    assert seen.amqp.accepted == connected + 1
    await seen.assert_completed_once(task_id)
    return len(seen.recorder.terminal(task_id)) > 1
