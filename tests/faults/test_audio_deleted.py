# SPDX-License-Identifier: Apache-2.0
"""The manifest is there and its audio is not, as after a lifecycle rule: the songs are made again."""

from pathlib import Path

from tests.support.scenario import scenario
from tests.support.waiting import WITHIN_S, eventually


async def test_a_finished_task_whose_audio_was_deleted_is_rendered_again(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    async with scenario(service_environment, tmp_path) as seen:
        await seen.peer.submit(task_id="song", batch_size=2)
        await seen.all_ended("song")
        first = seen.recorder.terminal("song")[0].data
        await seen.object_store.delete(first["audios"][1]["uri"])
        await seen.peer.submit(task_id="song", batch_size=2)
        await eventually(lambda: len(seen.recorder.terminal("song")) == 2, WITHIN_S)
        again = seen.recorder.terminal("song")[1]
        assert again.state == "completed"
        assert await seen.object_store.wrongs(again.data) == []
        assert [audio["seed"] for audio in again.data["audios"]] == [audio["seed"] for audio in first["audios"]]
        assert [warning for warning in again.data["warnings"] if "deleted" in warning]
