# SPDX-License-Identifier: Apache-2.0
"""Uploads of the page's form: what is stored, what is refused, and that nothing is left behind."""

import asyncio
import errno
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import aiohttp
import pytest

from acestep_consumer.client import uploads
from acestep_consumer.domain.errors import StorageRefused
from acestep_consumer.webui import source_upload
from tests.support.gateway import FakeResults
from tests.support.page import MAX_UPLOAD_BYTES, ServedPage, served_page
from tests.support.waiting import eventually


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of temporary files that is empty before and after each test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.iterdir())


async def send(served: ServedPage, body: Any, name: str = "a.wav", **headers: str) -> tuple[int, dict[str, Any]]:
    own = {"Origin": served.url} | headers
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{served.url}/uploads", params={"name": name}, data=body, headers=own) as answer,
    ):
        return answer.status, await answer.json(content_type=None) if answer.status != 403 else {}


async def in_chunks(size: int) -> AsyncIterator[bytes]:
    """A body that does not say how long it is."""
    for _ in range(0, size, 100_000):
        yield bytes(100_000)


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.MP3", ".mp3"), ("../../etc/passwd", ""), ("歌.flac", ".flac"), ("a.b/c d", ""), ("", "")]
)
async def test_a_file_is_stored_under_a_name_of_ours(name: str, suffix: str) -> None:
    async with served_page() as served:
        status, answer = await send(served, b"sound", name)
        assert status == 201
        ((address, stored),) = served.results.stored.items()
        assert answer == {"address": address}
        assert address.endswith(f"/src_audio_path{suffix}")
        assert stored == b"sound"


async def test_what_is_too_large_empty_or_from_another_site_is_refused() -> None:
    async with served_page() as served:
        for body in (bytes(MAX_UPLOAD_BYTES + 1), in_chunks(MAX_UPLOAD_BYTES + 100_000)):
            status, answer = await send(served, body)
            assert (status, answer["error"]["code"]) == (413, "upload_large")
        status, answer = await send(served, b"")
        assert (status, answer["error"]["code"]) == (400, "upload_empty")
        assert await send(served, b"sound", Origin="https://elsewhere.example") == (403, {})
        assert (await send(served, in_chunks(MAX_UPLOAD_BYTES)))[0] == 201
        assert len(served.results.stored) == 1


async def test_too_many_at_the_same_time_a_full_disk_and_silence_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served_page() as served:
        with monkeypatch.context() as patched:
            patched.setattr(source_upload, "spool", AsyncMock(side_effect=OSError(errno.ENOSPC, "full")))
            status, answer = await send(served, b"sound")
            assert (status, answer["error"]["code"]) == (507, "no_room")
        with monkeypatch.context() as patched:
            patched.setattr(uploads, "SILENCE_S", 0.05)
            status, answer = await send(served, silence())
            assert (status, answer["error"]["code"]) == (408, "upload_slow")
        assert (await send(served, b"sound"))[0] == 201
    monkeypatch.setattr(source_upload, "AT_ONCE", 0)
    async with served_page() as served:
        status, answer = await send(served, b"sound")
        assert (status, answer["error"]["code"]) == (503, "uploads_busy")


async def silence() -> AsyncIterator[bytes]:
    """A body that stops after its first byte."""
    yield b"R"
    await asyncio.Event().wait()


async def test_a_storage_that_is_away_or_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served_page() as served:
        served.results.away = True
        status, answer = await send(served, b"sound")
        assert (status, answer["error"]["code"]) == (502, "upload_away")
        refused = StorageRefused("s3://acestep/jobs", "AccessDenied")
        monkeypatch.setattr(FakeResults, "put", AsyncMock(side_effect=refused))
        status, answer = await send(served, b"sound")
        assert (status, answer["error"]["code"]) == (502, "upload_refused")


async def test_one_whose_sender_goes_leaves_nothing_and_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served_page() as served:
        sending = asyncio.create_task(send(served, silence()))
        await eventually(lambda: any(tmp_path.glob("*/*")))
        sending.cancel()
        await asyncio.wait({sending})
        await eventually(lambda: not any(tmp_path.iterdir()))
        assert not served.results.stored
        assert (await send(served, b"sound"))[0] == 201
    assert not caplog.records
