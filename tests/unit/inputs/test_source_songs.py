# SPDX-License-Identifier: Apache-2.0
"""Songs of earlier tasks that a request names: which are found, and what is said of those that are not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from acestep_consumer.domain.errors import (
    InputNotAllowed,
    InputUnreadable,
    InvalidRequest,
    ManifestUnreadable,
    StorageUnavailable,
)
from acestep_consumer.domain.job import Request, SideFile
from acestep_consumer.domain.objects import ObjectAddress, ObjectContent, SmallObject
from acestep_consumer.domain.outcome import TerminalRecord
from acestep_consumer.inputs.source_songs import StoredSongs
from acestep_consumer.storage import lineage
from acestep_consumer.storage.lineage import family_of
from acestep_schemas.events import ErrorCode, FileObject, ParentSong, SongFiles
from acestep_schemas.request import parse_request
from tests.support.fake_store import FakeStore
from tests.support.jobs import make_failure, make_job, make_manifest, make_rendering, make_track


def request(**fields: Any) -> Request:
    return Request("new", parse_request({"task_type": "cover", **fields})[0])


@pytest.fixture
async def store(tmp_path: Path) -> FakeStore:
    """A store with one song, its latents beside it, a task that failed, and a damaged one."""
    store, job = FakeStore(), make_job(task_id="first")
    stored = await store.put(job, make_rendering(make_track(tmp_path / "0.wav")))
    latents = FileObject(uri="s3://acestep/jobs/first/0.latents", content_type="x", bytes=1, sha256="0")
    done = make_manifest(job, stored)
    audio = done.audios[0].model_copy(update={"files": SongFiles(latents=latents)})
    await store.commit(TerminalRecord(done.model_copy(update={"audios": (audio,)})))
    await store.commit(TerminalRecord(make_failure("broken", "no sound")))
    store.objects[ObjectAddress("acestep", "jobs/damaged/manifest.json")] = SmallObject(b"{}", {})
    return store


async def test_a_song_is_found_with_its_latents_and_named_as_parent(store: FakeStore) -> None:
    found = await StoredSongs(store, allowed=True).resolve(request(source_task_id="first"))
    assert found.source is not None
    assert (found.source.uri, found.source.latents) == (
        "s3://acestep/jobs/first/0.wav",
        "s3://acestep/jobs/first/0.latents",
    )
    assert found.parents == (ParentSong(task_id="first", index=0, field="source_task_id"),)


@pytest.mark.parametrize(
    ("fields", "kind", "code", "text"),
    [
        ({"source_task_id": "other"}, InputUnreadable, "input_unreadable", "wait for its completed event"),
        ({"source_task_id": "broken"}, InputUnreadable, "input_unreadable", "ended without songs: failed, no sound"),
        (
            {"source_task_id": "damaged"},
            InputUnreadable,
            "input_unreadable",
            "the manifest of this task cannot be read",
        ),
        ({"source_task_id": "first", "source_index": 1}, InvalidRequest, "invalid_request", "must be below 1"),
    ],
)
async def test_a_song_that_is_not_there_is_an_error_that_says_why(
    fields: dict[str, Any], kind: type[Exception], code: str, text: str, store: FakeStore
) -> None:
    with pytest.raises(kind, match=text) as error:
        await StoredSongs(store, allowed=True).resolve(request(**fields))
    assert getattr(error.value, "code", None) == ErrorCode(code)


async def test_results_are_no_sources_where_they_are_no_inputs(store: FakeStore) -> None:
    with pytest.raises(InputNotAllowed, match="ACESTEP_INPUT_RESULTS=none"):
        await StoredSongs(store, allowed=False).resolve(request(source_task_id="first"))


async def test_latents_are_stored_beside_the_song_under_its_index(tmp_path: Path) -> None:
    store, job = FakeStore(), make_job(task_id="song")
    (tmp_path / "l").write_bytes(b"latents")
    track = make_track(tmp_path / "0.wav")
    beside = SideFile(kind="latents", path=tmp_path / "l", content_type="application/octet-stream")
    (stored,) = await store.put(job, make_rendering(replace(track, side_files=(beside,))))
    assert [file.uri for file in stored.side_files] == ["s3://acestep/jobs/song/0.latents.safetensors"]


async def test_a_family_is_its_ancestors_by_manifests_and_its_descendants_by_notes() -> None:
    store = FakeStore()
    relations: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["b"], "d": ["b", "a"], "e": ["gone"]}
    for task_id, parents in relations.items():
        job = make_job(task_id=task_id)
        named = tuple(ParentSong(task_id=each, index=0, field="source_task_id") for each in parents)
        await store.commit(TerminalRecord(make_manifest(job).model_copy(update={"parents": named})))
    assert [key.key for key in store.objects if "/children/" in key.key] == [
        "jobs/a/children/b",
        "jobs/b/children/c",
        "jobs/b/children/d",
        "jobs/a/children/d",
        "jobs/gone/children/e",
    ]
    family = await family_of("b", store)
    assert list(family.tasks) == ["b", "a", "c", "d"]
    assert family.first == ["a"]
    found = [(each.child, each.parent.task_id) for each in family.relations]
    assert found == [("b", "a"), ("c", "b"), ("d", "b"), ("d", "a")]
    below = await family_of("a", store)
    assert {(each.child, each.parent.task_id) for each in below.relations} == {
        ("b", "a"), ("c", "b"), ("d", "b"), ("d", "a"),
    }, "a task that comes from two is below both"  # fmt: skip
    assert len(below.relations) == 4
    orphan = await family_of("e", store)
    assert orphan.tasks["gone"] is None
    assert orphan.first == ["gone"]


async def test_a_relative_whose_manifest_cannot_be_read_does_not_hide_the_others() -> None:
    store = FakeStore()
    for task_id, parent in {"a": None, "b": "a", "c": "b", "d": "b"}.items():
        named = () if parent is None else (ParentSong(task_id=parent, index=0, field="variation"),)
        await store.commit(
            TerminalRecord(make_manifest(make_job(task_id=task_id)).model_copy(update={"parents": named}))
        )
    for task_id in ("a", "c"):
        store.objects[ObjectAddress("acestep", f"jobs/{task_id}/manifest.json")] = SmallObject(b"{}", {})
    family = await family_of("b", store)
    assert {each: found is not None for each, found in family.tasks.items()} == {
        "b": True, "a": False, "c": False, "d": True,
    }  # fmt: skip
    assert (family.unreadable, family.complete) == ({"a", "c"}, True)
    assert [task["found"] for task in family.listed("b", lambda *_: "")["tasks"]] == [False, False, True, True]
    with pytest.raises(ManifestUnreadable):
        await family_of("a", store)


async def test_a_parent_that_can_be_no_task_does_not_hide_the_others() -> None:
    store = FakeStore()
    for task_id, parents in {"first": ["../a"], "made": ["first"]}.items():
        named = tuple(ParentSong(task_id=each, index=0, field="variation") for each in parents)
        done = make_manifest(make_job(task_id=task_id)).model_copy(update={"parents": named})
        body = done.model_dump_json().encode()
        store.objects[ObjectAddress("acestep", f"jobs/{task_id}/manifest.json")] = SmallObject(body, {})
    assert list((await family_of("made", store)).tasks) == ["made", "first", "../a"]


async def test_a_family_that_is_too_large_ends_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "MOST_TASKS", 3)
    store = FakeStore()
    named = (ParentSong(task_id="first", index=0, field="variation"),)
    for number in range(6):
        done = make_manifest(make_job(task_id=f"take-{number}")).model_copy(update={"parents": named})
        await store.commit(TerminalRecord(done))
    family = await family_of("first", store)
    assert (len(family.tasks), family.complete) == (3, False)


async def test_an_outage_of_the_storage_costs_a_note_and_no_song(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore()
    put = store.fake.put

    async def down_for_notes(address: ObjectAddress, content: ObjectContent, *, only_new: bool = False) -> bool:
        if "/children/" in address.key:
            raise StorageUnavailable("s3://fake: the store is down")
        return await put(address, content, only_new=only_new)

    monkeypatch.setattr(store.fake, "put", down_for_notes)
    named = (ParentSong(task_id="first", index=0, field="variation"),)
    record = TerminalRecord(make_manifest(make_job(task_id="x")).model_copy(update={"parents": named}))
    with capture_logs() as logs:
        assert await store.commit(record) == record
    assert [entry["event"] for entry in logs] == ["source song does not list what came from it"]
    assert await store.find("x") is not None
