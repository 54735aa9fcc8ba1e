# SPDX-License-Identifier: Apache-2.0
"""`download`, and what `submit --download` has in common with it, where the folder is not for writing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from acestep_consumer.client import DownloadFailed, Job
from acestep_consumer.client.results import Results
from acestep_consumer.commands.download import download
from acestep_consumer.commands.submit import run as submit
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import load
from acestep_consumer.domain.errors import StorageRefused, StorageUnavailable
from acestep_consumer.domain.objects import ByteRange
from acestep_schemas.events import JobCompleted
from acestep_schemas.examples import completed
from tests.support.fake_store import FakeStream

SONG = b"a song"
TEXT = "error: songs cannot be written to {folder}: Not a directory\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that cannot be made: a file is where its parent should be."""
    (tmp_path / "songs").write_text("a file")
    return tmp_path / "songs/of-today"


def _sung(task_id: str) -> JobCompleted:
    event = completed()
    place = {"uri": f"s3://acestep/jobs/{task_id}/0.mp3", "url": None, "files": None}
    song = {"bytes": len(SONG), "sha256": sha256(SONG).hexdigest()}
    audio = event.data.audios[0].model_copy(update=place | song)
    return JobCompleted.of(event.data.model_copy(update={"task_id": task_id, "audios": (audio,)}))


async def test_songs_of_earlier_jobs_say_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def find(_: Results, task_id: str) -> JobCompleted:
        return completed().model_copy(update={"data": completed().data.model_copy(update={"task_id": task_id})})

    monkeypatch.setattr(Results, "find", find)
    said = StringIO()
    assert await download(load({}, None), ["song"], folder, Console(file=said, width=400), as_json=False) is Exit.USAGE
    assert said.getvalue() == TEXT.format(folder=folder)


async def test_a_job_with_a_song_that_is_gone_does_not_keep_the_others_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends: dict[str, JobCompleted | DownloadFailed | None] = {
        "gone": _sung("gone"),
        "changed": DownloadFailed("no manifest"),
        "empty": None,
        "kept": _sung("kept"),
    }

    async def find(_: Results, task_id: str) -> JobCompleted | None:
        if isinstance(found := ends[task_id], DownloadFailed):
            raise found
        return found

    @asynccontextmanager
    async def opened(_: Results, uri: str, span: ByteRange | None = None) -> AsyncIterator[FakeStream]:
        if "gone" in uri:
            raise StorageRefused(uri, "NoSuchKey", missing=True)
        yield FakeStream(len(SONG), SONG[span.first :] if span else SONG)

    monkeypatch.setattr(Results, "find", find)
    monkeypatch.setattr(Results, "open", opened)
    said = StringIO()
    exit_code = await download(load({}, None), list(ends), tmp_path, Console(file=said, width=400), as_json=False)
    assert exit_code is Exit.UNREACHABLE
    assert capsys.readouterr().out == f"{tmp_path / 'kept-0.mp3'}\n"
    assert (tmp_path / "kept-0.mp3").read_bytes() == SONG
    gone, changed, empty = said.getvalue().splitlines()
    assert gone == "error: download failed: s3://acestep/jobs/gone/0.mp3: NoSuchKey"
    assert (changed, empty[:18]) == ("error: download failed: no manifest", "error: empty: no r")


async def test_a_storage_that_is_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    async def find(_: Results, task_id: str) -> JobCompleted:
        asked.append(task_id)
        raise DownloadFailed("no answer") from StorageUnavailable("no answer")

    monkeypatch.setattr(Results, "find", find)
    assert await download(load({}, None), ["a", "b"], tmp_path, Console(file=StringIO()), as_json=True) == 4
    assert asked == ["a"]


async def test_songs_of_a_request_that_was_sent_say_so(folder: Path) -> None:
    class Ended:
        async def result(self, into: Path) -> tuple[Path, ...]:
            await asyncio.to_thread(into.mkdir, parents=True)
            return ()

    said = StringIO()
    assert await submit._download(cast("Job", Ended()), folder, Console(file=said, width=400)) is Exit.USAGE
    assert said.getvalue() == TEXT.format(folder=folder)
