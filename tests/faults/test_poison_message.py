# SPDX-License-Identifier: Apache-2.0
"""A message that nobody can read: to the dead letters once, on both kinds of queue, and the next one is served."""

from pathlib import Path

import pytest

from acestep_consumer.broker.topology import DEAD_LETTER
from tests.support.scenario import scenario

POISON = b"\xff\xfe{not a request"


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_poison_is_dead_lettered_once_and_holds_nothing_up(
    queue_type: str, service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path, ACESTEP_QUEUE_TYPE=queue_type) as seen:
        await seen.peer.request(POISON, message_id="poison", delivery_mode=2)
        await seen.peer.request(POISON, message_id="venom", delivery_mode=2)
        await seen.peer.submit(task_id="song")
        await seen.all_ended("poison", "venom", "song")
        await seen.assert_completed_once("song")
        for task_id in ("poison", "venom"):
            (told,) = seen.recorder.terminal(task_id)
            assert told.state == "rejected"
            assert told.data["error"]["code"] == "malformed_body"
        await seen.assert_nothing_left()
        dead = [await seen.peer.take(DEAD_LETTER) for _ in range(2)]
        assert [letter.body for letter in dead] == [POISON, POISON]
        assert await seen.peer.ready(DEAD_LETTER) == 0
    assert {event.task_id for event in seen.recorder.events} == {"poison", "venom", "song"}
