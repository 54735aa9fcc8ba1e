# SPDX-License-Identifier: Apache-2.0
"""``/v1/audio``: whole songs, ranges, and nothing else of the bucket."""

import asyncio
import json
from typing import Any
from urllib.parse import quote

import pytest
from yarl import URL

from acestep_consumer.webui import audio_proxy
from tests.support.gateway import AUTHORIZED, KEY, Served, completed, gateway, repainted
from tests.support.waiting import eventually

SONG = bytes(range(250)) * 20


async def with_song(served: Served, **headers: str) -> str:
    """Let a task end; returns the address of its song."""
    task_id = await served.release({"prompt": "a"}, headers=headers)
    await served.send(completed(task_id))
    served.results.stored[f"s3://acestep/jobs/{task_id}/0.mp3"] = SONG
    return f"{served.url}/v1/audio?path=%2F{task_id}%2F0.mp3"


async def test_a_song_is_streamed_whole_in_ranges_and_by_head() -> None:
    async with gateway() as served:
        url = await with_song(served)
        async with served.http.get(url, allow_redirects=False) as answer:
            assert (answer.status, answer.content_type, await answer.read()) == (200, "audio/mpeg", SONG)
            assert answer.headers["Accept-Ranges"] == "bytes"
            tag = answer.headers["ETag"]
        for asked, first, stop in (("bytes=0-9", 0, 10), ("bytes=100-", 100, 5000), ("bytes=-50", 4950, 5000)):
            async with served.http.get(url, headers={"Range": asked, "If-Range": tag}) as answer:
                assert (answer.status, await answer.read()) == (206, SONG[first:stop])
                assert answer.headers["Content-Range"] == f"bytes {first}-{stop - 1}/5000"
        async with served.http.get(url, headers={"Range": "bytes=5000-"}) as answer:
            assert answer.status == 416
        async with served.http.head(url) as answer:
            assert (answer.status, answer.content_length, await answer.read()) == (200, 5000, b"")
        whole = quote(url.removeprefix(served.url), safe="")
        async with served.http.get(f"{served.url}/api/v1/audio?path={whole}") as answer:
            assert await answer.read() == SONG


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/etc/passwd", 403),
        ("../../manifest.json", 403),
        ("/uploads/x/src_audio_path.mp3", 403),
        ("/never/0.mp3", 404),
        ("/{task}/1.mp3", 404),
        ("/{task}/manifest.json", 403),
        ("/{task}/0.mp3%00", 403),
        ("s3://acestep/jobs/{task}/0.mp3", 403),
    ],
)
async def test_nothing_else_is_reachable(path: str, status: int) -> None:
    async with gateway() as served:
        url = await with_song(served)
        task_id = url.split("%2F")[1]
        found, answer = await served.get(f"/v1/audio?path={path.format(task=task_id)}")
        assert found == status
        assert "s3://" not in answer["detail"]


async def test_lyrics_with_times_are_sent_as_text_that_a_browser_does_not_run() -> None:
    texts = {"lrc": b"[00:01.60]last train leaves at nine\n", "vtt": b"WEBVTT\n\n00:01.600 --> 00:03.600\nlast train\n"}
    types = {"lrc": "text/plain", "vtt": "text/vtt"}
    async with gateway() as served:
        event = repainted("a")
        audio = event.data.audios[0].model_dump()
        for kind, text in texts.items():
            served.results.stored[f"s3://acestep/jobs/a/0.{kind}"] = text
            audio["files"][kind] |= {"bytes": len(text), "content_type": "text/html"}
        await served.send(repainted("a", audios=[audio]))
        (entry,) = await served.query("a")
        (item,) = json.loads(entry["result"])
        for kind, text in texts.items():
            async with served.http.get(served.url + item[kind]) as answer:
                assert (answer.status, answer.content_type, answer.charset) == (200, types[kind], "utf-8")
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert await answer.read() == text
            async with served.http.get(served.url + item[kind], headers={"Range": "bytes=0-5"}) as answer:
                assert (answer.status, await answer.read()) == (206, text[:6])
            async with served.http.head(served.url + item[kind]) as answer:
                assert (answer.status, answer.content_length, await answer.read()) == (200, len(text), b"")
        assert (await served.get("/v1/audio?path=/a/0.latents.safetensors"))[0] == 403
        # A song's lyrics are no audio to work on.
        status, refused = await served.post("/release_task", {"task_type": "cover", "src_audio_path": item["lrc"]})
        assert (status, "there is no song" in refused["detail"]) == (400, True)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"uri": "s3://secrets/0.lrc"}, 403),
        ({"bytes": 5}, 502),  # not what is stored
        ({"bytes": 1 << 30}, 502),
        ({"uri": "s3://acestep/jobs/a/1.lrc"}, 404),  # asked for by another name
    ],
)
async def test_lyrics_are_refused_that_are_elsewhere_or_others_than_the_event_says(
    change: dict[str, Any], status: int
) -> None:
    async with gateway() as served:
        audio = repainted("a").data.audios[0].model_dump()
        audio["files"]["lrc"] |= change
        served.results.stored |= {"s3://acestep/jobs/a/0.lrc": b"la", "s3://secrets/0.lrc": b"la"}
        await served.send(repainted("a", audios=[audio]))
        found, answer = await served.get("/v1/audio?path=/a/0.lrc")
        assert (found, "s3://" in answer["detail"]) == (status, False)


async def test_a_path_is_needed_and_a_deleted_song_is_missing() -> None:
    async with gateway() as served:
        assert (await served.get("/v1/audio"))[0] == 422
        url = await with_song(served)
        served.results.stored.clear()
        assert await served.get(url.removeprefix(served.url)) == (
            404,
            {"detail": "Audio file not found", "error": "Audio file not found"},
        )


async def test_an_object_outside_of_the_tasks_folder_is_refused_whatever_an_event_says() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        audio = completed(task_id).data.audios[0].model_copy(update={"uri": "s3://secrets/0.mp3"})
        served.results.stored["s3://secrets/0.mp3"] = SONG
        await served.send(completed(task_id, audios=(audio,)))
        assert (await served.get(f"/v1/audio?path=/{task_id}/0.mp3"))[0] == 403


async def test_a_key_comes_by_header_or_in_the_address_of_a_player() -> None:
    async with gateway(ACESTEP_API_KEY=KEY) as served:
        url = await with_song(served, **AUTHORIZED)
        for address, headers, status in (
            (url, {}, 401),
            (url, AUTHORIZED, 200),
            (f"{url}&ai_token={KEY}", {}, 200),
            (f"{url}&ai_token=wrong", {}, 401),
        ):
            async with served.http.get(address, headers=headers) as answer:
                assert answer.status == status


async def test_a_player_that_takes_nothing_gives_its_connection_to_storage_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audio_proxy, "STALL_S", 0.1)
    size = 30_000_000  # more than the sockets' buffers hold
    async with gateway() as served:
        event = completed("a")
        audio = event.data.audios[0].model_copy(update={"bytes": size})
        served.results.stored[audio.uri] = bytes(size)
        await served.send(completed("a", audios=(audio,)))
        url = URL(served.url)
        reader, writer = await asyncio.open_connection(url.host, url.port, limit=1024)
        writer.write(f"GET /v1/audio?path=/a/0.mp3 HTTP/1.1\r\nHost: {url.host}:{url.port}\r\n\r\n".encode())
        await eventually(lambda: served.results.opened == 1)
        await eventually(lambda: served.results.opened == 0)
        assert len(await reader.read(size)) < size
        writer.close()
