# SPDX-License-Identifier: Apache-2.0
"""Keys of objects and files beside a song, without a server."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.job import Rendering, SideFile
from acestep_consumer.domain.objects import ObjectAddress, object_key
from acestep_consumer.storage.results import ResultStore
from tests.support.fake_store import FakeObjects
from tests.support.jobs import make_job, make_rendering, make_track

TASK_IDS = st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True)


@pytest.mark.parametrize("prefix", ["jobs", "jobs/", "/jobs", "/jobs/"])
def test_slashes_around_the_prefix_make_no_difference(prefix: str) -> None:
    assert object_key(prefix, "t1", "0.mp3") == "jobs/t1/0.mp3"


@pytest.mark.parametrize(("prefix", "key"), [("", "t1/0.mp3"), ("/", "t1/0.mp3"), ("a/b", "a/b/t1/0.mp3")])
def test_a_prefix_may_be_empty_or_deep(prefix: str, key: str) -> None:
    assert object_key(prefix, "t1", "0.mp3") == key


@given(TASK_IDS)
def test_every_task_has_a_folder_of_its_own(task_id: str) -> None:
    assert object_key("jobs", task_id, "manifest.json").split("/") == ["jobs", task_id, "manifest.json"]


@pytest.mark.parametrize("task_id", ["", ".", "..", "a/b", "../other", "a\n", "ä", "a" * 129, "a b"])
def test_an_id_that_is_none_makes_no_key(task_id: str) -> None:
    with pytest.raises(ValueError, match="not a task id"):
        object_key("jobs", task_id, "manifest.json")


@pytest.mark.parametrize(("place", "uri"), [(ObjectAddress("b"), "s3://b"), (ObjectAddress("b", "k/"), "s3://b/k/")])
def test_a_place_reads_as_its_uri(place: ObjectAddress, uri: str) -> None:
    assert str(place) == uri


def _with_lyrics(folder: Path, lrc: bytes) -> Rendering:
    folder.mkdir(exist_ok=True)
    (folder / "0.lrc").write_bytes(lrc)
    side = SideFile(kind="lrc", path=folder / "0.lrc", content_type="text/plain; charset=utf-8")
    return make_rendering(replace(make_track(folder / "0.mp3"), side_files=(side,)))


def _result_store(objects: FakeObjects) -> ResultStore:
    return ResultStore(objects, StorageSettings(bucket="acestep", prefix="jobs"))


class TestFilesBesideASong:
    async def test_they_lie_under_the_songs_index_with_their_own_digest(self, tmp_path: Path) -> None:
        objects = FakeObjects()

        (stored,) = await _result_store(objects).put(make_job(task_id="t1"), _with_lyrics(tmp_path, b"[00:01.00]la"))

        (lyrics,) = stored.side_files
        assert (stored.uri, lyrics.uri) == ("s3://acestep/jobs/t1/0.mp3", "s3://acestep/jobs/t1/0.lrc")
        assert (lyrics.bytes, lyrics.sha256) == (12, sha256(b"[00:01.00]la").hexdigest())
        assert objects.objects[ObjectAddress("acestep", "jobs/t1/0.lrc")].body == b"[00:01.00]la"

    async def test_a_later_attempt_takes_over_those_of_the_earlier_one(self, tmp_path: Path) -> None:
        store = _result_store(FakeObjects())
        (earlier,) = await store.put(make_job(task_id="t1"), _with_lyrics(tmp_path / "1", b"[00:01.00]la"))

        (later,) = await store.put(make_job(task_id="t1"), _with_lyrics(tmp_path / "2", b"[00:01.04]la"))

        assert later.side_files == earlier.side_files

    async def test_another_message_of_the_same_task_writes_them_beside(self, tmp_path: Path) -> None:
        store = _result_store(FakeObjects())
        await store.put(make_job(task_id="t1", message="aaaaaaaaaa"), _with_lyrics(tmp_path / "1", b"[00:01.00]la"))

        second = make_job(task_id="t1", message="bbbbbbbbbb")
        (other,) = await store.put(second, _with_lyrics(tmp_path / "2", b"[00:01.00]lo"))

        assert other.side_files[0].uri == "s3://acestep/jobs/t1/0-bbbbbbbb.lrc"
        assert other.uri == "s3://acestep/jobs/t1/0-bbbbbbbb.mp3"
