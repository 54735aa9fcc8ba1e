# SPDX-License-Identifier: Apache-2.0
"""The archive of all songs: whole or visibly broken, and never more of it in memory than a chunk."""

import asyncio
import io
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import aiohttp
import pytest

from acestep_consumer.client.results import Results
from acestep_consumer.config.settings import load
from acestep_consumer.domain.errors import StorageUnavailable
from acestep_consumer.webui.archive import ArchivedSong, ArchiveIncomplete, archive
from acestep_consumer.webui.audio_proxy import AudioProxy
from acestep_schemas import examples
from acestep_schemas.events import Audio
from tests.support.gateway import FakeResults
from tests.support.page import served_page

SIZE = 5_000_000
CHUNK = 1 << 16


class LargeSongs(FakeResults):
    """Songs of five megabytes, of which the one named "torn" ends in an outage."""

    @asynccontextmanager
    async def open(self, uri: str, span: object = None) -> AsyncIterator[object]:  # type: ignore[override]  # one part of it
        yield _LargeSong(torn="torn" in uri)


class _LargeSong:
    size = SIZE

    def __init__(self, *, torn: bool) -> None:
        self._torn = torn

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, SIZE, CHUNK):
            if self._torn and start > SIZE / 2:
                raise StorageUnavailable("it does not answer")
            yield bytes(min(CHUNK, SIZE - start))


def song(task_id: str) -> ArchivedSong:
    facts = {"uri": f"s3://acestep/jobs/{task_id}/0.wav", "bytes": SIZE, "format": "wav"}
    audio: Audio = examples.completed().data.audios[0].model_copy(update=facts)
    return ArchivedSong(task_id, audio)


def proxy() -> AudioProxy:
    return AudioProxy(load({}, env_file=None).storage, cast("Results", LargeSongs()), lambda _: None)


async def test_songs_are_stored_in_pieces_of_the_size_in_which_they_are_read() -> None:
    pieces = [piece async for piece in archive(proxy(), [song("one"), song("two")])]
    assert max(map(len, pieces)) < CHUNK + 1_000
    with zipfile.ZipFile(io.BytesIO(b"".join(pieces))) as found:
        assert found.testzip() is None
        assert [(each.filename, each.file_size) for each in found.infolist()] == [
            ("one-0.wav", SIZE),
            ("two-0.wav", SIZE),
        ]


async def test_an_outage_in_the_middle_of_a_song_is_an_error_and_not_a_shorter_archive() -> None:
    with pytest.raises(ArchiveIncomplete):
        async for _ in archive(proxy(), [song("one"), song("torn")]):
            pass


async def test_a_browser_sees_that_an_archive_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served_page() as served, aiohttp.ClientSession() as http:
        monkeypatch.setattr(FakeResults, "open", LargeSongs.open)
        served.complete("torn", song("torn").audio)
        board = served.board.cursor.split("-")[0]
        async with http.get(f"{served.url}/songs.zip?board={board}&jobs=1") as answer:
            assert answer.status == 200
            with pytest.raises(aiohttp.ClientError):
                async with asyncio.timeout(10):
                    await answer.read()
