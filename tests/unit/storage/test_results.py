# SPDX-License-Identifier: Apache-2.0
"""Keys of objects, without a server."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.domain.objects import ObjectAddress
from acestep_consumer.storage.results import object_key, track_name
from tests.support.jobs import make_track

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


@pytest.mark.parametrize(("file", "name"), [("song.mp3", "3.mp3"), ("x.tar.FLAC", "3.flac"), ("bare", "3")])
def test_a_song_is_named_by_its_index_and_the_encoders_ending(tmp_path: Path, file: str, name: str) -> None:
    assert track_name(3, make_track(tmp_path / file)) == name


@pytest.mark.parametrize(("place", "uri"), [(ObjectAddress("b"), "s3://b"), (ObjectAddress("b", "k/"), "s3://b/k/")])
def test_a_place_reads_as_its_uri(place: ObjectAddress, uri: str) -> None:
    assert str(place) == uri
