# SPDX-License-Identifier: Apache-2.0
"""Downloads from a store that misbehaves: what arrives is whole and right, or nothing is kept."""

import asyncio
import errno
import fcntl
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from acestep_consumer.client import download as download_module
from acestep_consumer.client.download import TRIES, download
from acestep_consumer.client.errors import DownloadFailed
from acestep_consumer.client.results import Results
from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.objects import ObjectAddress, ObjectContent
from acestep_schemas import examples
from acestep_schemas.events import Completed, FileObject, SongFiles
from tests.support.fake_store import FakeObjects
from tests.support.waiting import eventually

SONG = os.urandom(3 << 20)
ID = examples.TASK_ID
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Store:
    """An HTTP server with one song. ``faults`` answer the first requests, one each; ``ranges`` are what was asked."""

    def __init__(self) -> None:
        self.song = SONG
        self.knows_ranges = True
        self.faults: list[Answer] = []
        self.ranges: list[str | None] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        if self.faults:
            return await self.faults.pop(0)(request)
        if asked is None or not self.knows_ranges:
            return web.Response(body=self.song)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(self.song):
            return web.Response(status=416)
        return web.Response(status=206, body=self.song[start:])

    async def breaks_off(self, request: web.Request) -> web.StreamResponse:
        """Half of the song, then the connection ends."""
        response = web.StreamResponse(headers={"Content-Length": str(len(self.song))})
        await response.prepare(request)
        await response.write(self.song[: len(self.song) // 2])
        assert request.transport is not None
        request.transport.abort()
        return response

    async def is_overloaded(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    async def refuses(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=403)


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    ours = Store()
    app = web.Application()
    app.router.add_get("/song", ours.answer)
    async with TestServer(app) as server:
        ours.url = str(server.make_url("/song"))
        yield ours


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acestep_consumer.client.download.backoff", lambda *_: iter([0.0] * 100))


def job(uri: str = "s3://acestep/jobs/order-4711/0.wav", body: bytes = SONG, url: str | None = None) -> Completed:
    (audio,) = examples.completed().data.audios
    digest = hashlib.sha256(body).hexdigest()
    named = audio.model_copy(update={"uri": uri, "url": url, "bytes": len(body), "sha256": digest})
    return examples.completed().data.model_copy(update={"audios": (named,)})


async def fetch(store: Store, folder: Path, **fields: Any) -> Path:
    (path,) = await download(job(url=store.url, **fields), folder, None)
    return path


def results_in(objects: FakeObjects) -> Results:
    """Results that read from ``objects``."""
    results = Results(StorageSettings())
    results._objects = objects
    return results


async def stored(body: bytes = SONG) -> FakeObjects:
    """An object storage that has the song."""
    objects = FakeObjects()
    await objects.put(ObjectAddress.of(job().audios[0].uri), ObjectContent.of(body, "audio/wav"))
    return objects


async def test_with_keys_for_storage_the_url_is_not_used(store: Store, tmp_path: Path) -> None:
    """It may have expired."""
    part(tmp_path).write_bytes(SONG[:1000])
    (path,) = await download(job(url=store.url), tmp_path, results_in(await stored()))
    assert (path.read_bytes(), store.ranges) == (SONG, [])


async def test_where_the_keys_do_not_suffice_the_url_is(store: Store, tmp_path: Path) -> None:
    for objects in (FakeObjects(), FakeObjects(down=True)):
        (path,) = await download(job(url=store.url), tmp_path / str(objects.down), results_in(objects))
        assert path.read_bytes() == SONG
    assert store.ranges == [None, None]


async def test_without_a_url_the_storage_has_the_last_word(tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match="NoSuchKey"):
        await download(job(), tmp_path, results_in(FakeObjects()))
    with pytest.raises(DownloadFailed, match="larger than its event says: 1,000 bytes"):
        await download(job(body=SONG[:1000]), tmp_path, results_in(await stored()))
    assert files(tmp_path) == []


async def test_lyrics_with_times_come_with_the_song(tmp_path: Path) -> None:
    objects, lyrics = await stored(), {"lrc": b"[00:01.60]la la\n", "vtt": b"WEBVTT\n"}
    named = {
        kind: FileObject(
            uri=f"s3://acestep/jobs/order-4711/0.{kind}",
            content_type="text/plain",
            bytes=len(body),
            sha256=hashlib.sha256(body).hexdigest(),
        )
        for kind, body in lyrics.items()
    }
    for kind, body in lyrics.items():
        await objects.put(ObjectAddress.of(named[kind].uri), ObjectContent.of(body, "text/plain"))
    audio = job().audios[0].model_copy(update={"files": SongFiles(lrc=named["lrc"], vtt=named["vtt"])})

    paths = await download(job().model_copy(update={"audios": (audio,)}), tmp_path, results_in(objects))

    assert [path.name for path in paths] == [f"{ID}-0.wav"]
    assert {path.name: path.read_bytes() for path in files(tmp_path)} == {
        f"{ID}-0.wav": SONG,
        f"{ID}-0.lrc": lyrics["lrc"],
        f"{ID}-0.vtt": lyrics["vtt"],
    }


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def part(folder: Path) -> Path:
    return folder / f"{ID}-0.wav.part"


async def test_a_song_arrives_whole(store: Store, tmp_path: Path) -> None:
    path = await fetch(store, tmp_path / "new")
    assert path == tmp_path / "new" / f"{ID}-0.wav"
    assert path.read_bytes() == SONG
    assert files(path.parent) == [path]


async def test_a_download_that_breaks_off_goes_on_where_it_stopped(store: Store, tmp_path: Path) -> None:
    store.faults = [store.breaks_off, store.is_overloaded]
    assert (await fetch(store, tmp_path)).read_bytes() == SONG
    first, second, third = store.ranges
    assert first is None
    assert second == third
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= len(SONG) // 2


async def test_what_an_earlier_call_left_is_gone_on_with(store: Store, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(SONG[:1000])
    assert (await fetch(store, tmp_path)).read_bytes() == SONG
    assert store.ranges == ["bytes=1000-"]


async def test_a_store_that_knows_no_ranges_is_read_from_the_start(store: Store, tmp_path: Path) -> None:
    store.knows_ranges = False
    part(tmp_path).write_bytes(b"x" * 1000)
    assert (await fetch(store, tmp_path)).read_bytes() == SONG


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * len(SONG), b"x" * (len(SONG) + 1)])
async def test_what_is_left_of_something_else_is_thrown_away(store: Store, tmp_path: Path, left: bytes) -> None:
    part(tmp_path).write_bytes(left)
    assert (await fetch(store, tmp_path)).read_bytes() == SONG


async def test_a_file_that_differs_is_replaced(store: Store, tmp_path: Path) -> None:
    (tmp_path / f"{ID}-0.wav").write_bytes(b"x" * len(SONG))
    assert (await fetch(store, tmp_path)).read_bytes() == SONG


async def test_a_song_that_is_not_the_one_that_the_event_names_is_not_kept(store: Store, tmp_path: Path) -> None:
    store.song = SONG[:-1] + bytes([SONG[-1] ^ 1])
    with pytest.raises(DownloadFailed, match="SHA-256"):
        await fetch(store, tmp_path)
    assert files(tmp_path) == []


async def test_a_song_that_is_larger_than_the_event_says_is_not_read_to_its_end(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match="larger"):
        await fetch(store, tmp_path, body=SONG[:1000])
    assert files(tmp_path) == []


async def test_a_link_that_is_refused_says_why_at_once(store: Store, tmp_path: Path) -> None:
    store.faults = [store.refuses]
    with pytest.raises(DownloadFailed, match="expired"):
        await fetch(store, tmp_path)
    assert len(store.ranges) == 1


async def test_a_store_that_stays_away_is_given_up_and_the_beginning_stays(store: Store, tmp_path: Path) -> None:
    store.faults = [store.breaks_off, *[store.is_overloaded] * TRIES]
    with pytest.raises(DownloadFailed, match="HTTP 503; gave up"):
        await fetch(store, tmp_path)
    assert 0 < part(tmp_path).stat().st_size <= len(SONG) // 2
    assert (await fetch(store, tmp_path)).read_bytes() == SONG


async def test_two_downloads_into_one_folder_at_once_do_not_write_into_each_others_file(
    store: Store, tmp_path: Path
) -> None:
    both = asyncio.Barrier(2)

    async def waits_for_the_other(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(SONG))})
        await response.prepare(request)
        await response.write(SONG[: len(SONG) // 2])
        await both.wait()
        await response.write(SONG[len(SONG) // 2 :])
        return response

    store.faults = [waits_for_the_other] * 2
    paths = await asyncio.gather(fetch(store, tmp_path), fetch(store, tmp_path))
    assert [path.read_bytes() for path in paths] == [SONG, SONG]
    assert store.ranges == [None, None]
    assert files(tmp_path) == [tmp_path / f"{ID}-0.wav"]


async def stopped_half_way(store: Store, folder: Path) -> None:
    """Cancel a download that has half of its song."""

    async def stands_still(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(SONG))})
        await response.prepare(request)
        await response.write(SONG[: len(SONG) // 2])
        await asyncio.Event().wait()
        return response

    store.faults = [stands_still]
    task = asyncio.create_task(fetch(store, folder))
    await eventually(lambda: any(path.stat().st_size >= len(SONG) // 2 for path in files(folder)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_download_that_is_cancelled_is_resumed(store: Store, tmp_path: Path) -> None:
    await stopped_half_way(store, tmp_path)
    assert files(tmp_path) == [part(tmp_path)]
    assert (await fetch(store, tmp_path)).read_bytes() == SONG
    assert store.ranges == [None, f"bytes={len(SONG) // 2}-"]
    assert files(tmp_path) == [tmp_path / f"{ID}-0.wav"]


async def test_one_beside_another_program_that_is_cancelled_leaves_nothing(store: Store, tmp_path: Path) -> None:
    with part(tmp_path).open("wb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        await stopped_half_way(store, tmp_path)
        assert files(tmp_path) == [part(tmp_path)]
        assert part(tmp_path).stat().st_size == 0


async def test_a_part_whose_download_completes_while_it_is_opened_is_not_written_to(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, whole = download_module._lock_at_once, tmp_path / "theirs"

    def after_the_other(descriptor: int) -> None:
        if not whole.exists():
            part(tmp_path).rename(whole)
        at_once(descriptor)

    monkeypatch.setattr(download_module, "_lock_at_once", after_the_other)
    assert (await fetch(store, tmp_path)).read_bytes() == SONG
    assert whole.read_bytes() == b""


async def test_a_file_system_without_locks_is_no_hindrance(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    assert (await fetch(store, tmp_path)).read_bytes() == SONG


async def test_no_part_is_open_when_it_is_renamed_on_windows_which_refuses_that(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def refuses_open_files(source: Path, target: Path) -> None:
        if str(source) in map(os.path.realpath, Path("/proc/self/fd").iterdir()):
            raise PermissionError(errno.EACCES, "used by another process", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuses_open_files)
    monkeypatch.setattr(download_module, "sys", Mock(platform="win32"))
    assert (await fetch(store, tmp_path)).read_bytes() == SONG
    assert files(tmp_path) == [tmp_path / f"{ID}-0.wav"]


async def test_a_storage_that_says_nothing_is_given_up_as_soon_as_one_that_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        results = Results(StorageSettings(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"), retry_s=0.5)
        try:
            async with asyncio.timeout(20):  # it was a minute, whatever the limit
                with pytest.raises(DownloadFailed, match=r"no answer in time; check ACESTEP_S3_ENDPOINT\); gave up"):
                    await results.find(ID)
        finally:
            await results.close()


@pytest.mark.parametrize("uri", ["s3://b/..", "s3://b/x\ny", "s3://b/" + "x" * 300])
async def test_an_event_cannot_choose_a_place_outside_the_folder(store: Store, tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "songs"
    for task_id in ("../../x", "/x", "ok\0"):
        with pytest.raises(DownloadFailed, match="not a valid file name"):
            await download(job(url=store.url).model_copy(update={"task_id": task_id}), folder, None)
    if uri != "s3://b/..":
        with pytest.raises(DownloadFailed, match="not a valid file name"):
            await fetch(store, folder, uri=uri)
    assert not folder.exists()
