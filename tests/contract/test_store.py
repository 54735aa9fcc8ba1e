# SPDX-License-Identifier: Apache-2.0
"""What every ``ports.Store`` does, run on the fake in memory and on the real one with a real S3 server."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageUnavailable
from acestep_consumer.domain.job import Rendering, StoredObject
from acestep_consumer.domain.outcome import TerminalRecord, outcome_of
from acestep_consumer.domain.ports import Store
from acestep_consumer.storage.results import ResultStore
from acestep_consumer.storage.s3.objects import S3Objects
from infra.local.s3 import SeaweedFS
from tests.support.fake_store import FakeStore
from tests.support.jobs import make_failure, make_job, make_manifest, make_rendering, make_track

PART_BYTES = 5 << 20  # the smallest that S3 takes
TRACE = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture(scope="module")
def session(s3: SeaweedFS) -> boto3.Session:
    """One for all tests: it takes a third of a second to read its description of S3."""
    return boto3.Session(aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key)


@pytest.fixture(params=["fake", "s3"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "fake":
        yield FakeStore()
        return
    server: SeaweedFS = request.getfixturevalue("s3")
    prefix: str = request.getfixturevalue("s3_prefix")
    settings = StorageSettings(endpoint=server.endpoint, bucket=server.bucket, prefix=prefix)
    session: boto3.Session = request.getfixturevalue("session")
    async with S3Objects(settings, session=session, retry_s=5) as objects:
        objects.part_bytes = PART_BYTES
        yield ResultStore(objects, settings)


class TestAStore:
    async def test_finds_nothing_for_a_new_task(self, store: Store) -> None:
        assert await store.find("never-seen") is None

    async def test_says_where_each_song_lies_and_what_it_weighs(self, store: Store, tmp_path: Path) -> None:
        first = make_track(tmp_path / "a.wav", b"first", seed=3)
        second = make_track(tmp_path / "b.wav", b"the second", seed=4)

        stored = await store.put(make_job(task_id="two-songs", batch_size=2), make_rendering(first, second))

        assert [(each.track, each.bytes, each.sha256) for each in stored] == [
            (first, 5, hashlib.sha256(b"first").hexdigest()),
            (second, 10, hashlib.sha256(b"the second").hexdigest()),
        ]
        assert [each.uri.rpartition("two-songs/")[2] for each in stored] == ["0.wav", "1.wav"]
        assert all(each.uri.startswith("s3://") for each in stored)

    async def test_a_job_with_songs_but_no_manifest_is_not_done(self, store: Store, tmp_path: Path) -> None:
        job = make_job()
        await store.put(job, make_rendering(make_track(tmp_path / "a.wav")))

        assert await store.find(job.task_id) is None

    async def test_a_committed_job_is_found_and_makes_the_same_event(self, store: Store, tmp_path: Path) -> None:
        job = make_job(lyrics="ünïcode ♯", bpm=97, seed=(5,), audio_duration=0.1 + 0.2)
        stored = await store.put(job, make_rendering(make_track(tmp_path / "a.wav")))

        committed = await store.commit(TerminalRecord(make_manifest(job, stored), "m1"))
        found = await store.find(job.task_id)

        assert found is not None
        assert outcome_of(found) == outcome_of(committed)
        assert found.message == "m1"

    async def test_an_end_without_songs_is_kept_as_well(self, store: Store) -> None:
        ending = make_failure("no-songs")

        await store.commit(TerminalRecord(ending, "m1", TRACE))
        found = await store.find("no-songs")

        assert found == TerminalRecord(ending, "m1", TRACE)

    async def test_of_two_messages_without_songs_the_later_ones_end_counts(self, store: Store) -> None:
        first = TerminalRecord(make_failure("twice", "the first"), "m1")
        second = TerminalRecord(make_failure("twice", "the second"), "m2")
        assert await store.commit(first) == first
        assert await store.commit(second) == second
        assert await store.find("twice") == second

    async def test_a_message_that_ended_without_songs_keeps_its_first_end(self, store: Store) -> None:
        first = await store.commit(TerminalRecord(make_failure("twice", "the first"), "m1"))
        assert await store.commit(TerminalRecord(make_failure("twice", "the second"), "m1")) == first

    async def test_songs_do_not_replace_an_end_of_the_same_message(self, store: Store) -> None:
        """It may have been told."""
        job = make_job()
        first = await store.commit(TerminalRecord(make_failure(job.task_id), "m1"))
        assert await store.commit(TerminalRecord(make_manifest(job), "m1")) == first

    async def test_songs_replace_another_messages_end_without_songs_and_never_the_reverse(self, store: Store) -> None:
        job = make_job()
        await store.commit(TerminalRecord(make_failure(job.task_id), "m1"))
        songs = TerminalRecord(make_manifest(job), "m2")
        assert await store.commit(songs) == songs
        assert await store.commit(TerminalRecord(make_failure(job.task_id), "m3")) == songs

    async def test_songs_whose_audio_is_gone_are_replaced_by_who_saw_that(self, store: Store) -> None:
        job = make_job()
        gone = await store.commit(TerminalRecord(make_manifest(job), "m1"))
        again = TerminalRecord(make_manifest(job, worker_id="second"), "m1")
        assert await store.commit(again, gone) == again

    async def test_songs_whose_audio_is_gone_are_not_replaced_by_an_error(self, store: Store) -> None:
        job = make_job()
        gone = await store.commit(TerminalRecord(make_manifest(job), "m1"))
        assert await store.commit(TerminalRecord(make_failure(job.task_id), "m2"), gone) == gone
        assert await store.find(job.task_id) == gone

    async def test_the_first_commit_wins_and_the_second_gets_it_back(self, store: Store) -> None:
        job = make_job()
        first = await store.commit(TerminalRecord(make_manifest(job, worker_id="first"), "m1"))

        second = await store.commit(TerminalRecord(make_manifest(job, worker_id="second"), "m2"))

        assert second == first
        assert second.ending.worker_id == "first"

    async def test_of_many_racing_commits_all_return_one_winner(self, store: Store) -> None:
        job = make_job()
        manifests = [make_manifest(job, worker_id=f"worker-{number}") for number in range(8)]

        returned = await asyncio.gather(*(store.commit(TerminalRecord(manifest, "m1")) for manifest in manifests))

        assert len({each.ending.worker_id for each in returned}) == 1

    async def test_a_commit_repeated_after_a_lost_answer_returns_its_own_manifest(self, store: Store) -> None:
        manifest = make_manifest(make_job())
        await store.commit(TerminalRecord(manifest, "m1"))

        assert await store.commit(TerminalRecord(manifest, "m1")) == TerminalRecord(manifest, "m1")

    @pytest.mark.parametrize("size", [64, PART_BYTES + 1], ids=["small", "in parts"])
    async def test_a_second_attempt_takes_over_the_song_of_the_first(
        self, store: Store, tmp_path: Path, size: int
    ) -> None:
        """Otherwise the loser of a race would swap the bytes under the winner's manifest."""
        job = make_job()
        earlier = make_track(tmp_path / "a.wav", b"1" * size, seed=11)
        later = make_track(tmp_path / "b.wav", b"2" * (size + 1), seed=22)
        first = await store.put(job, make_rendering(earlier))

        second = await store.put(job, make_rendering(later))

        assert _said(second) == _said(first)
        assert second[0].track.seed == 11

    async def test_another_message_never_takes_over_or_replaces_a_song(self, store: Store, tmp_path: Path) -> None:
        """Two requests under one id: whichever manifest counts in the end, its checksums fit."""
        first = await store.put(make_job(task_id="one", message="aaaaaaaaaa"), rendering_of(tmp_path / "a.wav", b"1"))
        second = await store.put(make_job(task_id="one", message="bbbbbbbbbb"), rendering_of(tmp_path / "b.wav", b"2"))
        again = await store.put(make_job(task_id="one", message="bbbbbbbbbb"), rendering_of(tmp_path / "c.wav", b"3"))
        assert _said(second) == _said(again) != _said(first)
        assert [stored[0].uri.rpartition("/")[2] for stored in (first, second)] == ["0.wav", "0-bbbbbbbb.wav"]

    async def test_audio_that_is_gone_or_another_is_missing(self, store: Store, tmp_path: Path) -> None:
        job = make_job()
        stored = await store.put(job, rendering_of(tmp_path / "a.wav", b"1"))
        record = TerminalRecord(make_manifest(job, stored), "m1")
        assert not await store.missing(record)
        elsewhere = (replace(stored[0], uri=f"{stored[0].uri}.gone"),)
        assert await store.missing(TerminalRecord(make_manifest(job, elsewhere), "m1"))
        other = (replace(stored[0], sha256="0" * 64),)
        assert await store.missing(TerminalRecord(make_manifest(job, other), "m1"))
        assert not await store.missing(TerminalRecord(make_failure(job.task_id), "m1"))

    async def test_an_id_that_could_leave_its_folder_is_not_a_key(self, store: Store) -> None:
        with pytest.raises(ValueError, match="not a task id"):
            await store.find("../other")


def rendering_of(path: Path, content: bytes) -> Rendering:
    return make_rendering(make_track(path, content))


def _said(stored: tuple[StoredObject, ...]) -> list[tuple[str, int, str, int, float]]:
    return [(each.uri, each.bytes, each.sha256, each.track.seed, each.track.duration_s) for each in stored]


async def test_the_fake_can_be_down() -> None:
    with pytest.raises(StorageUnavailable):
        await FakeStore(down=True).find("any")
