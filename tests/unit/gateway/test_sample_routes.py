# SPDX-License-Identifier: Apache-2.0
"""Texts by the language model, as tasks that somebody waits for."""

import asyncio
from typing import Any

import pytest

from acestep_consumer.gateway import sample_routes
from acestep_schemas.events import Metas
from tests.support.gateway import Served, announced, completed, gateway, unfinished
from tests.support.waiting import WITHIN_S, eventually

METAS = Metas(bpm=90, duration=120.0, keyscale="D minor", timesignature="4", language="en", caption="c", lyrics="l")


async def asked(served: Served, path: str, body: object, *, succeeds: bool = True) -> tuple[int, Any]:
    """Send a request and let its task end."""
    asking = asyncio.create_task(served.post(path, body))
    await eventually(lambda: served.client.published)
    task_id = served.client.published[-1]["task_id"]
    await served.send(completed(task_id, songs=0, metas=METAS) if succeeds else unfinished("failed", task_id))
    async with asyncio.timeout(WITHIN_S):
        return await asking


async def test_a_text_is_rewritten_ahead_of_all_songs() -> None:
    async with gateway() as served:
        body = {"prompt": "jazz", "lyrics": "la", "temperature": 0.8, "param_obj": '{"bpm": 90, "language": "en"}'}
        status, answer = await asked(served, "/format_input", body)
        assert (status, answer["code"]) == (200, 200)
        assert answer["data"] == {
            "caption": "c",
            "lyrics": "l",
            "bpm": 90,
            "key_scale": "D minor",
            "time_signature": "4",
            "duration": 120.0,
            "vocal_language": "en",
        }
        (message,) = served.client.published
        assert served.client.options[0]["priority"] == 9
        assert message == {
            "prompt": "jazz",
            "lyrics": "la",
            "param_obj": '{"bpm": 90, "language": "en"}',
            "use_format": True,
            "analysis_only": True,
            "lm_temperature": 0.8,
            "batch_size": 1,
            "queue_deadline_s": 25.0,
            "task_id": message["task_id"],
        }


async def test_a_song_is_written_from_a_description() -> None:
    async with gateway() as served:
        body = {"query": "a waltz", "instrumental": True, "vocal_language": "de"}
        _, answer = await asked(served, "/v1/create_sample", body)
        assert set(answer["data"]) == {
            *("caption", "lyrics", "bpm", "keyscale", "duration", "timesignature", "vocal_language"),
        }
        (message,) = served.client.published
        assert (message["sample_query"], message["lyrics"], message["vocal_language"]) == ("a waltz", "[inst]", "de")


@pytest.mark.parametrize("path", ["/format_input", "/v1/create_sample"])
async def test_a_failure_is_a_soft_error(path: str) -> None:
    async with gateway() as served:
        status, answer = await asked(served, path, {"prompt": "a", "query": "a"}, succeeds=False)
        assert (status, answer["code"], answer["data"]) == (200, 500, None)
        assert answer["error"]


@pytest.mark.parametrize("path", ["/format_input", "/v1/create_sample"])
async def test_without_a_language_model_or_in_time_it_is_503(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway() as served:
        await served.send(announced(lm=None))
        assert (await served.post(path, {"prompt": "a"}))[0] == 503
        assert served.client.published == []
    monkeypatch.setattr(sample_routes, "WITHIN_S", 0.05)
    async with gateway() as served:
        assert (await served.post(path, {"prompt": "a"}))[0] == 503
        assert served.client.cancelled == [served.client.published[0]["task_id"]]


async def test_examples_have_the_fields_of_their_kind() -> None:
    async with gateway() as served:
        _, simple = await served.post("/create_random_sample")
        assert set(simple["data"]) == {"description", "instrumental", "vocal_language"}
        _, custom = await served.post("/create_random_sample", {"sample_type": "custom_mode"})
        assert set(custom["data"]) == {
            *("think", "caption", "lyrics", "bpm", "duration", "keyscale", "language", "timesignature"),
        }
