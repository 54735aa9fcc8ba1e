# SPDX-License-Identifier: Apache-2.0
"""The connection breaks when half of a confirm has reached the worker: was the event heard or not? It is told again."""

from pathlib import Path

from acestep_consumer.broker.topology import DEAD_LETTER
from tests.support.proxy import Direction, Where
from tests.support.scene import PUBLISHING, manifest_of, scene
from tests.support.waiting import WITHIN_S, eventually

# The frame of a confirm has 21.
HALF_A_CONFIRM = 10


async def test_an_event_whose_confirm_is_lost_is_told_again_in_the_same_words(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scene(service_environment, tmp_path) as seen:
        with seen.s3.hold(manifest_of("song", "PUT")) as hold:
            await seen.peer.submit(task_id="song", batch_size=2)
            await eventually(lambda: hold.waiting, WITHIN_S)
            connected = seen.amqp.accepted
            seen.amqp.drop_after(HALF_A_CONFIRM, Where(Direction.DOWN, PUBLISHING))
        await eventually(lambda: len(seen.recorder.terminal("song")) == 2, WITHIN_S)
        assert seen.amqp.accepted == connected + 1
        await seen.assert_completed_once("song")
        await seen.assert_nothing_left()
        assert await seen.peer.ready(DEAD_LETTER) == 0
    assert not seen.worker.log_lines(event="handler failed")
