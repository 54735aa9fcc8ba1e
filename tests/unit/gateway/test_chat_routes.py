# SPDX-License-Identifier: Apache-2.0
"""``/v1/chat/completions``: the request that a chat becomes, and its answer, whole and streamed."""

import asyncio
import base64
import json
from typing import Any

import pytest

from acestep_consumer.gateway import chat_routes
from acestep_consumer.gateway.answers import ApiError
from acestep_consumer.gateway.chat_request import read_chat
from tests.support.gateway import Served, completed, gateway, unfinished
from tests.support.waiting import WITHIN_S, eventually

SONG = bytes(range(250)) * 20
DATA = base64.b64encode(b"RIFF song").decode()


def chat(content: object, **more: object) -> dict[str, Any]:
    return {"model": "acestep/acestep-v15-turbo", "messages": [{"role": "user", "content": content}], **more}


async def finish(served: Served, *, succeeds: bool = True) -> str:
    """Let the task of a chat end."""
    await eventually(lambda: served.client.published)
    task_id = str(served.client.published[-1]["task_id"])
    served.results.stored[f"s3://acestep/jobs/{task_id}/0.mp3"] = SONG
    await served.send(completed(task_id, songs=2) if succeeds else unfinished("failed", task_id))
    return task_id


async def test_a_chat_is_answered_with_the_first_song() -> None:
    async with gateway() as served:
        asking = asyncio.create_task(served.post("/v1/chat/completions", chat("slow jazz", batch_size=4)))
        await finish(served)
        async with asyncio.timeout(WITHIN_S):
            status, answer = await asking
        assert status == 200
        assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
        assert (answer["object"], answer["model"]) == ("chat.completion", "acestep/acestep-v15-turbo")
        ((choice),) = answer["choices"]
        message = choice["message"]
        assert (choice["index"], choice["finish_reason"], message["role"]) == (0, "stop", "assistant")
        assert message["content"].startswith("## Metadata\n**BPM:** 72\n**Duration:** 600s\n**Key:** D minor")
        (audio,) = message["audio"]
        assert audio["type"] == "audio_url"
        assert audio["audio_url"]["url"] == "data:audio/mpeg;base64," + base64.b64encode(SONG).decode()
        (request,) = served.client.published
        assert (request["prompt"], request["batch_size"], request["model"]) == ("slow jazz", 1, "acestep-v15-turbo")
        assert served.client.options[0]["priority"] == 9


async def test_a_streamed_chat_has_dots_text_song_and_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_routes, "DOT_S", 0.01)
    async with gateway() as served:
        body = chat("slow jazz", stream=True)
        async with (
            asyncio.timeout(WITHIN_S),
            served.http.post(f"{served.url}/v1/chat/completions", json=body) as answer,
        ):
            assert answer.content_type == "text/event-stream"
            lines = [await answer.content.readuntil(b"\n\n") for _ in range(3)]
            await finish(served)
            lines += (await answer.read()).split(b"\n\n")
        chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.strip() and b"[DONE]" not in line]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert chunks[0]["object"] == "chat.completion.chunk"
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[1] == {"content": "."}
        assert deltas[-3]["content"].startswith("\n\n## Metadata")
        assert deltas[-2]["audio"][0]["audio_url"]["url"].endswith(base64.b64encode(SONG).decode())
        assert (deltas[-1], chunks[-1]["choices"][0]["finish_reason"]) == ({}, "stop")
        assert lines[-2] == b"data: [DONE]"


async def test_errors_are_told_in_the_stream_or_by_their_status() -> None:
    async with gateway() as served:
        async with served.http.post(f"{served.url}/v1/chat/completions", json=chat("a", stream=True)) as answer:
            await finish(served, succeeds=False)
            text = (await answer.read()).decode()
        assert "\\n\\nError: resource_exhausted" in text
        assert text.endswith('"finish_reason": "error"}]}\n\ndata: [DONE]\n\n')
        served.client.published.clear()
        asking = asyncio.create_task(served.post("/v1/chat/completions", chat("a")))
        await finish(served, succeeds=False)
        status, problem = await asking
        assert status == 500
        assert problem["detail"].startswith("resource_exhausted")
        empty: tuple[dict[str, Any], ...] = (chat(""), {"messages": []}, {"model": "x"}, chat([{"type": "text"}]))
        for body in empty:
            assert (await served.post("/v1/chat/completions", body))[0] == 400


async def test_a_task_that_nobody_waits_for_any_more_is_cancelled() -> None:
    async with gateway(ACESTEP_GENERATION_TIMEOUT="0.05") as served:
        assert (await served.post("/v1/chat/completions", chat("a")))[0] == 504
        assert len(served.client.cancelled) == 1
    async with gateway() as served:
        asking = asyncio.create_task(served.post("/v1/chat/completions", chat("a")))
        await eventually(lambda: served.client.published)
        asking.cancel()
        await eventually(lambda: served.client.cancelled)
        async with served.http.post(f"{served.url}/v1/chat/completions", json=chat("a", stream=True)) as answer:
            await answer.content.readuntil(b"\n\n")
        await eventually(lambda: len(served.client.cancelled) == 2)


async def test_audio_in_a_chat_is_uploaded_in_the_order_of_the_task() -> None:
    parts = [
        {"type": "text", "text": "as jazz"},
        {"type": "input_audio", "input_audio": {"data": "not base64!", "format": "mp3"}},
        {"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": f"data:audio/mp3;base64,{DATA}", "format": "../x"}},
    ]
    async with gateway() as served:
        asking = asyncio.create_task(served.post("/v1/chat/completions", chat(parts, task_type="cover")))
        task_id = await finish(served)
        assert (await asking)[0] == 200
        (request,) = served.client.published
        assert request["src_audio_path"] == f"s3://acestep/jobs/uploads/{task_id}/src_audio_path.wav"
        assert request["reference_audio_path"] == f"s3://acestep/jobs/uploads/{task_id}/reference_audio_path"
        assert served.results.stored[request["src_audio_path"]] == b"RIFF song"


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (chat("slow jazz"), {"prompt": "slow jazz"}),
        (chat("<Prompt>jazz</Prompt> <lyrics>la\nla</lyrics>"), {"prompt": "jazz", "lyrics": "la\nla"}),
        (chat("[Verse 1]\nla la"), {"lyrics": "[Verse 1]\nla la"}),
        (chat("one\ntwo\nthree\nfour"), {"lyrics": "one\ntwo\nthree\nfour"}),
        (chat("jazz", lyrics="la"), {"prompt": "jazz", "lyrics": "la"}),
        (chat("a waltz", sample_mode=True), {"sample_query": "a waltz", "sample_mode": True}),
        (chat("jazz", audio_config={"instrumental": True}), {"prompt": "jazz", "lyrics": "[inst]"}),
        (chat("jazz", seed="1,2"), {"prompt": "jazz", "seed": "1,2", "use_random_seed": False}),
        (
            chat("jazz", temperature=0.7, top_p=0.9, audio_config={"duration": 30, "format": "wav", "bpm": 90}),
            {
                "prompt": "jazz",
                "lm_temperature": 0.7,
                "lm_top_p": 0.9,
                "audio_duration": 30,
                "audio_format": "wav",
                "bpm": 90,
            },
        ),
    ],
)
def test_a_chat_is_read_as_a_request(body: dict[str, Any], fields: dict[str, object]) -> None:
    assert read_chat(body).fields == fields | {"model": "acestep-v15-turbo", "batch_size": 1}


def test_the_last_message_of_the_user_counts_and_a_model_need_not_be_named() -> None:
    messages = [{"role": "user", "content": "old"}, {"role": "user", "content": "new"}, {"role": "assistant"}]
    found = read_chat({"messages": messages})
    assert (found.fields["prompt"], found.model, "model" in found.fields) == ("new", "", False)
    with pytest.raises(ApiError, match="none of role user"):
        read_chat({"messages": [{"role": "system", "content": "x"}]})


async def test_no_more_chats_at_the_same_time_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_routes, "AT_ONCE", 0)
    async with gateway() as served:
        assert (await served.post("/v1/chat/completions", chat("a")))[0] == 503
