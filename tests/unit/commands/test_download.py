# SPDX-License-Identifier: Apache-2.0
"""`download`, and what `submit --download` has in common with it, where the folder is not for writing."""

import asyncio
from io import StringIO
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from acestep_consumer.client import Job
from acestep_consumer.client.results import Results
from acestep_consumer.commands.download import download
from acestep_consumer.commands.submit import run as submit
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import load
from acestep_schemas.events import JobCompleted
from acestep_schemas.examples import completed

TEXT = "error: songs cannot be written to {folder}: Not a directory\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that cannot be made: a file is where its parent should be."""
    (tmp_path / "songs").write_text("a file")
    return tmp_path / "songs/of-today"


async def test_songs_of_earlier_jobs_say_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def find(_: Results, task_id: str) -> JobCompleted:
        return completed().model_copy(update={"data": completed().data.model_copy(update={"task_id": task_id})})

    monkeypatch.setattr(Results, "find", find)
    said = StringIO()
    assert await download(load({}, None), ["song"], folder, Console(file=said, width=400), as_json=False) is Exit.USAGE
    assert said.getvalue() == TEXT.format(folder=folder)


async def test_songs_of_a_request_that_was_sent_say_so(folder: Path) -> None:
    class Ended:
        async def result(self, into: Path) -> tuple[Path, ...]:
            await asyncio.to_thread(into.mkdir, parents=True)
            return ()

    said = StringIO()
    assert await submit._download(cast("Job", Ended()), folder, Console(file=said, width=400)) is Exit.USAGE
    assert said.getvalue() == TEXT.format(folder=folder)
