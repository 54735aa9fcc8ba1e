# SPDX-License-Identifier: Apache-2.0
"""The connection breaks when half of an ack has reached the broker: the job is done, and the message comes again."""

from pathlib import Path

from tests.support.proxy import Direction, Where
from tests.support.scenario import CONSUMING, manifest_of, scenario
from tests.support.waiting import WITHIN_S, eventually

# The frame of an ack has 21.
HALF_AN_ACK = 10


async def test_half_an_ack_is_none_and_the_end_is_told_again_in_the_same_words(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path) as seen:
        with seen.s3.hold(manifest_of("song", "PUT")) as hold:
            await seen.peer.submit(task_id="song", batch_size=2)
            await eventually(lambda: hold.waiting, WITHIN_S)
            connected = seen.amqp.accepted
            # From here on the worker says nothing on this connection before the ack but heartbeats.
            seen.amqp.drop_after(HALF_AN_ACK, Where(Direction.UP, CONSUMING))
        await eventually(lambda: len(seen.recorder.terminal("song")) == 2, WITHIN_S)
        assert seen.amqp.accepted == connected + 1
        await seen.assert_completed_once("song")
        assert seen.recorder.states("song").count("started") == 1
        await seen.assert_nothing_left()
