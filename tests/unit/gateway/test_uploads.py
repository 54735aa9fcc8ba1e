# SPDX-License-Identifier: Apache-2.0
"""Uploads, and other audio that a request names."""

import errno
import io
import os
from pathlib import Path
from typing import Any
from unittest.mock import ANY, AsyncMock

import aiohttp
import pytest

from acestep_consumer.client import QueueFull
from acestep_consumer.domain.errors import StorageRefused
from acestep_consumer.gateway import uploads
from acestep_consumer.gateway.messages import song_name
from tests.support.gateway import AUTHORIZED, KEY, FakeResults, Served, completed, gateway


def form_of(*parts: tuple[str, object, str | None]) -> aiohttp.FormData:
    """A form of (name, content, file name), in this order."""
    form = aiohttp.FormData(default_to_multipart=True)
    for name, content, filename in parts:
        form.add_field(name, content, filename=filename)
    return form


async def send(served: Served, *parts: tuple[str, object, str | None], **headers: str) -> tuple[int, Any]:
    return await served.post("/release_task", data=form_of(*parts), headers=headers)


async def test_a_file_lands_in_the_bucket_and_replaces_the_path() -> None:
    async with gateway() as served:
        song = b"RIFF" + bytes(3_000_000)
        status, answer = await send(
            served,
            ("src_audio", io.BytesIO(song), "../../etc/passwd.WAV"),
            ("task_type", "cover", None),
            ("src_audio_path", "/srv/theirs.wav", None),
            ("prompt", "jazz", None),
        )
        assert status == 200, answer
        (message,) = served.client.published
        task_id = answer["data"]["task_id"]
        address = f"s3://acestep/jobs/uploads/{task_id}/src_audio_path.wav"
        assert message["src_audio_path"] == address
        assert served.results.stored == {address: song}
        assert (message["task_type"], message["prompt"]) == ("cover", "jazz")


async def test_of_two_names_for_one_file_the_first_counts_and_text_in_its_place_is_ignored() -> None:
    async with gateway() as served:
        status, _ = await send(
            served,
            ("reference_audio", b"later", "a.mp3"),
            ("ref_audio", b"first", "b.mp3"),
            ("src_audio", "/etc/passwd", None),
            ("ctx_audio", b"", ""),
            ("prompt", "a", None),
        )
        assert status == 200
        assert list(served.results.stored.values()) == [b"first"]
        assert not {"src_audio", "ctx_audio", "src_audio_path"} & set(served.client.published[0])


async def test_a_wrong_key_costs_no_upload_and_a_key_after_the_files_is_seen_first() -> None:
    async with gateway(ACESTEP_API_KEY=KEY) as served:
        file = ("src_audio", b"song", "a.mp3")
        fields = (("task_type", "cover", None), ("prompt", "a", None))
        assert (await send(served, file, *fields, Authorization="Bearer wrong"))[0] == 401
        assert (await send(served, file, *fields))[0] == 401
        assert (await send(served, file, *fields, ("ai_token", "wrong", None)))[0] == 401
        assert served.results.stored == {}
        assert (await send(served, file, *fields, ("ai_token", KEY, None)))[0] == 200
        assert (await send(served, file, *fields, **AUTHORIZED))[0] == 200
        assert len(served.results.stored) == 2
        assert "ai_token" not in served.client.published[0]


async def test_files_are_bounded_in_size_number_and_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_STRANGER_BYTES", 10)
    async with gateway(ACESTEP_API_KEY=KEY, ACESTEP_INPUT_MAX_BYTES="1000") as served:
        fields = (("task_type", "cover", None), ("prompt", "a", None))
        assert (await send(served, ("src_audio", bytes(1001), "a.mp3"), *fields, **AUTHORIZED))[0] == 413
        assert (await send(served, ("src_audio", bytes(11), "a.mp3"), *fields, ("ai_token", KEY, None)))[0] == 401
        before = (("ai_token", KEY, None), ("src_audio", bytes(11), "a.mp3"), *fields)
        assert (await send(served, *before))[0] == 200
        many = tuple((f"field{number}", "x", None) for number in range(uploads.MAX_PARTS + 1))
        assert (await send(served, *many, **AUTHORIZED))[0] == 400
        monkeypatch.setattr(uploads, "MAX_TEXT_BYTES", 1024)
        text = ("prompt", "a" * 1025, None)
        assert (await send(served, text, **AUTHORIZED))[0] == 400


async def test_no_more_uploads_at_the_same_time_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "AT_ONCE", 0)
    async with gateway() as served:
        status, answer = await send(served, ("prompt", "a", None))
        assert (status, answer["detail"]) == (503, "too many uploads at the same time")


async def test_those_without_a_key_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "STRANGERS_AT_ONCE", 0)
    async with gateway(ACESTEP_API_KEY=KEY) as served:
        assert (await send(served, ("prompt", "a", None), ("ai_token", KEY, None)))[0] == 503
        assert (await send(served, ("prompt", "a", None), **AUTHORIZED))[0] == 200


async def test_an_upload_is_deleted_when_the_queue_is_full_and_refused_while_storage_is_away() -> None:
    parts = (("src_audio", b"song", "a.mp3"), ("task_type", "cover", None), ("prompt", "a", None))
    async with gateway() as served:
        served.client.refusal = QueueFull(3)
        assert (await send(served, *parts))[0] == 429
        assert served.results.stored == {}
        served.results.away = True
        assert (await send(served, *parts))[0] == 503


async def test_a_storage_that_refuses_uploads_is_not_said_to_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = StorageRefused("s3://acestep/jobs/uploads/a", "AccessDenied")
    monkeypatch.setattr(FakeResults, "put", AsyncMock(side_effect=refused))
    async with gateway() as served:
        status, answer = await send(served, ("src_audio", b"song", "a.mp3"), ("prompt", "a", None))
        assert (status, answer["detail"]) == (503, "the storage refuses uploads: this server's keys may not write them")


async def test_nothing_of_an_upload_is_left_on_disk(tmp_path: Path) -> None:
    async with gateway(ACESTEP_SCRATCH_DIR=str(tmp_path)) as served:
        parts = (("src_audio", b"song", "a.mp3"), ("task_type", "cover", None), ("prompt", "a", None))
        assert (await send(served, *parts))[0] == 200
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - pathlib would be a blocking call in a coroutine


@pytest.mark.parametrize("field", ["src_audio_path", "ctx_audio_path", "sourceAudioPath"])
async def test_a_song_of_this_api_is_a_source_without_an_upload(field: str) -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        await served.send(completed(task_id))
        for path in (f"/{task_id}/0.mp3", f"{task_id}/0.mp3", f"/v1/audio?path=%2F{task_id}%2F0.mp3"):
            await served.release({"prompt": "a", "task_type": "cover", field: path})
            assert served.client.published[-1]["src_audio_path"] == f"s3://acestep/jobs/{task_id}/0.mp3"


@pytest.mark.parametrize(
    "body",
    [
        {"src_audio_path": "/etc/passwd"},
        {"src_audio_path": "../secret"},
        {"src_audio_path": "song.mp3"},
        {"src_audio_path": "/never/0.mp3"},
        {"src_audio_path": "s3://acestep/jobs/theirs/0.mp3"},
        {"src_audio_path": " S3://acestep/jobs/theirs/0.mp3"},
        {"ctx_audio_path": "s3://acestep/jobs/theirs/0.mp3"},
        {"param_obj": {"src_audio_path": "s3://acestep/jobs/theirs/0.mp3"}},
        {"metas": '{"referenceAudioPath": "s3://acestep/jobs/theirs/0.mp3"}'},
        {"reference_audio_path": "https://169.254.169.254/latest"},
        {"reference_audio_path": "https://songs.example@evil.example/a.mp3"},
        {"lora": "s3://acestep/jobs/theirs/x.safetensors"},
        {"lora": {"path": "s3://acestep/jobs/theirs/x.safetensors"}},
        {"loras": ["s3://acestep/jobs/theirs/x.safetensors"]},
        {"input": {"prompt": "a", "src_audio_path": "s3://acestep/jobs/theirs/0.mp3"}},
    ],
)
async def test_places_that_the_operator_does_not_allow_are_refused(body: dict[str, object]) -> None:
    fields = body if "input" in body else {"prompt": "a", "task_type": "cover", **body}
    async with gateway(ACESTEP_INPUT_HOSTS="songs.example") as served:
        status, answer = await served.post("/release_task", fields)
        assert status == 400, answer
        assert served.client.published == []


async def test_places_that_the_operator_allows_are_passed_on() -> None:
    async with gateway(ACESTEP_INPUT_HOSTS="songs.example", ACESTEP_INPUT_BUCKETS="inputs") as served:
        for place in ("s3://inputs/a.mp3", "https://songs.example/a.mp3"):
            await served.release({"prompt": "a", "task_type": "cover", "src_audio_path": place})
            assert served.client.published[-1]["src_audio_path"] == place


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/t-1/0.mp3", ("t-1", "0.mp3")),
        ("%2Ft-1%2F0.mp3", ("t-1", "0.mp3")),
        ("http://host:8001/v1/audio?path=%2Ft-1%2F12-abcdef01.flac", ("t-1", "12-abcdef01.flac")),
        ("/t-1/manifest.json", None),
        ("/uploads/t-1/0.mp3", None),
        ("/t-1/../0.mp3", None),
        ("s3://bucket/0.mp3", None),
        ("/t-1/0.mp3\0", None),
        ("https://[songs.example/v1/audio?path=%2Ft-1%2F0.mp3", None),
        ("", None),
    ],
)
def test_a_songs_path_is_read_by_one_form(path: str, found: tuple[str, str] | None) -> None:
    assert song_name(path) == found


async def test_an_address_that_cannot_be_read_is_refused_and_no_error_of_the_server() -> None:
    async with gateway(ACESTEP_INPUT_HOSTS="songs.example") as served:
        body = {"prompt": "a", "task_type": "cover", "src_audio_path": "https://[songs.example/a.mp3"}
        async with served.http.post(f"{served.url}/release_task", json=body) as answer:
            assert answer.status == 400
        async with served.http.get(f"{served.url}/v1/audio", params={"path": "//[x"}) as answer:
            assert answer.status == 403


async def test_a_full_disk_is_503_and_the_next_upload_finds_room(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (("src_audio", b"sound", "a.wav"), ("prompt", "a", None))
    async with gateway() as served:
        with monkeypatch.context() as patched:
            patched.setattr(uploads, "spool", AsyncMock(side_effect=OSError(errno.ENOSPC, "full")))
            status, answer = await send(served, *parts)
            assert (status, "no room for uploads" in answer["detail"]) == (503, True)
        assert await send(served, *parts) == (200, ANY)
