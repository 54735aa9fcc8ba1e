# SPDX-License-Identifier: Apache-2.0
"""``ResultStore`` on a real S3 server: what lies there afterwards, and what it does when S3 misbehaves."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import boto3
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageRefused, StorageUnavailable
from acestep_consumer.domain.outcome import TerminalRecord
from acestep_consumer.storage.results import ResultStore
from acestep_consumer.storage.s3.objects import S3Objects
from acestep_schemas.events import Completed
from infra.local.s3 import SeaweedFS
from tests.support.faulty_s3 import FaultyS3, s3_error
from tests.support.jobs import make_job, make_manifest, make_rendering, make_track
from tests.support.waiting import WITHIN_S, eventually

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

Connect = Callable[..., AbstractAsyncContextManager[ResultStore]]
PART_BYTES = 5 << 20  # the smallest that S3 takes


def _session(server: SeaweedFS, **keys: str) -> boto3.Session:
    return boto3.Session(
        aws_access_key_id=keys.get("access_key", server.access_key),
        aws_secret_access_key=keys.get("secret_key", server.secret_key),
        region_name="us-east-1",
    )


@asynccontextmanager
async def _store(
    server: SeaweedFS, prefix: str, session: boto3.Session, *, retry_s: float = 10, **settings: Any
) -> AsyncIterator[ResultStore]:
    values = {"endpoint": server.endpoint, "bucket": server.bucket, "prefix": prefix, **settings}
    chosen = StorageSettings.model_validate(values)
    async with S3Objects(chosen, session=session, retry_s=retry_s) as objects:
        objects.part_bytes = PART_BYTES
        yield ResultStore(objects, chosen)


@pytest.fixture(scope="module")
def session(s3: SeaweedFS) -> boto3.Session:
    """One for all tests: it takes a third of a second to read its description of S3."""
    return _session(s3)


@pytest.fixture
def connect(s3: SeaweedFS, s3_prefix: str, session: boto3.Session) -> Connect:
    """Opens a store on this test's prefix; arguments override settings."""
    return lambda **values: _store(s3, s3_prefix, **{"session": session, **values})


@pytest.fixture
async def faulty(s3: SeaweedFS) -> AsyncIterator[FaultyS3]:
    async with FaultyS3(s3.endpoint) as front:
        yield front


@dataclass(frozen=True)
class ObjectStore:
    """This test's prefix in the session's bucket, as boto3 sees it: ``name`` is a key without the prefix."""

    client: "S3Client"
    bucket: str
    prefix: str

    def get(self, name: str) -> "GetObjectOutputTypeDef":
        return self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")

    def put(self, name: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=body)

    def keys(self, *, bucket: str | None = None) -> list[str]:
        listing = self.client.list_objects_v2(Bucket=bucket or self.bucket, Prefix="" if bucket else self.prefix)
        return [entry["Key"] for entry in listing.get("Contents", [])]

    def open_uploads(self) -> list[str]:
        uploads = self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])
        return [upload["Key"] for upload in uploads if upload["Key"].startswith(self.prefix)]


@pytest.fixture
def object_store(s3: SeaweedFS, s3_prefix: str, session: boto3.Session) -> ObjectStore:
    return ObjectStore(session.client("s3", endpoint_url=s3.endpoint), s3.bucket, s3_prefix)


def _is_put(request: web.Request) -> bool:
    return request.method == "PUT"


class TestWhatLiesInTheBucket:
    async def test_a_small_song_has_its_bytes_its_type_and_its_digest(
        self, connect: Connect, object_store: ObjectStore, tmp_path: Path
    ) -> None:
        track = make_track(tmp_path / "a.mp3", b"ID3 and so on", seed=7, content_type="audio/mpeg")
        async with connect() as store:
            (stored,) = await store.put(make_job(task_id="t1"), make_rendering(track))

        found = object_store.get("t1/0.mp3")
        assert stored.uri == f"s3://{object_store.bucket}/{object_store.prefix}/t1/0.mp3"
        assert found["Body"].read() == b"ID3 and so on"
        assert found["ContentType"] == "audio/mpeg"
        assert found["Metadata"]["sha256"] == hashlib.sha256(b"ID3 and so on").hexdigest()

    @pytest.mark.parametrize("size", [(1 << 20) + 1, 2 * PART_BYTES + 5], ids=["over a megabyte", "three parts"])
    async def test_a_large_song_arrives_whole(
        self, connect: Connect, object_store: ObjectStore, tmp_path: Path, size: int
    ) -> None:
        content = hashlib.sha256(b"seed").digest() * (size // 32) + b"#" * (size % 32)
        async with connect() as store:
            (stored,) = await store.put(make_job(task_id="t1"), make_rendering(make_track(tmp_path / "a.wav", content)))

        found = object_store.get("t1/0.wav")
        assert hashlib.sha256(found["Body"].read()).hexdigest() == stored.sha256 == found["Metadata"]["sha256"]
        assert stored.bytes == size
        assert found["ContentType"] == "audio/wav"

    async def test_the_manifest_is_the_completed_data_as_json(
        self, connect: Connect, object_store: ObjectStore
    ) -> None:
        manifest = make_manifest(make_job(task_id="t1"))
        async with connect() as store:
            await store.commit(TerminalRecord(manifest, "m1"))

        found = object_store.get("t1/manifest.json")
        assert found["Body"].read() == manifest.model_dump_json().encode()
        assert found["ContentType"] == "application/json"

    async def test_an_object_that_no_worker_wrote_is_replaced_and_reported(
        self, connect: Connect, object_store: ObjectStore, tmp_path: Path
    ) -> None:
        object_store.put("t1/0.wav", b"somebody's")
        async with connect() as store:
            with capture_logs() as logs:
                await store.put(make_job(task_id="t1"), make_rendering(make_track(tmp_path / "a.wav", b"ours")))

        assert object_store.get("t1/0.wav")["Body"].read() == b"ours"
        assert [entry["event"] for entry in logs] == ["object that no worker wrote replaced"]

    async def test_two_workers_that_race_leave_a_manifest_that_is_true(
        self, connect: Connect, object_store: ObjectStore, tmp_path: Path
    ) -> None:
        job = make_job(batch_size=2)

        async def work(store: ResultStore, name: str) -> None:
            tracks = [make_track(tmp_path / f"{name}{index}.wav", name.encode() * 99, seed=index) for index in (1, 2)]
            stored = await store.put(job, make_rendering(*tracks))
            await store.commit(TerminalRecord(make_manifest(job, stored, worker_id=name), name))

        async with connect() as store:
            await asyncio.gather(*(work(store, f"worker-{number}") for number in range(6)))
            kept = await store.find(job.task_id)

        assert kept is not None
        assert isinstance(kept.ending, Completed)
        for audio in kept.ending.audios:
            body = object_store.get(audio.uri.partition(f"/{object_store.prefix}/")[2])["Body"].read()
            assert (hashlib.sha256(body).hexdigest(), len(body)) == (audio.sha256, audio.bytes)


class TestPresignedUrls:
    async def test_there_are_none_unless_they_are_asked_for(self, connect: Connect, tmp_path: Path) -> None:
        async with connect() as store:
            (stored,) = await store.put(make_job(), make_rendering(make_track(tmp_path / "a.wav")))
        assert stored.url is None

    async def test_anyone_can_download_by_the_url(self, connect: Connect, tmp_path: Path) -> None:
        async with connect(presign_s=60) as store:
            (stored,) = await store.put(make_job(), make_rendering(make_track(tmp_path / "a.wav", b"listen")))

        assert stored.url is not None
        assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in stored.url
        async with aiohttp.ClientSession() as http, http.get(stored.url) as response:
            assert await response.read() == b"listen"


class TestCheck:
    async def test_a_missing_bucket_is_an_error_that_names_it_and_is_not_created(
        self, connect: Connect, object_store: ObjectStore
    ) -> None:
        bucket = f"typo-{object_store.prefix[5:25]}"
        async with connect(bucket=bucket) as store:
            for _ in range(2):
                with pytest.raises(StorageRefused, match=f"s3://{bucket}: NoSuchBucket .*ACESTEP_S3_CREATE_BUCKET"):
                    await store.check()

    async def test_it_makes_a_missing_bucket_if_it_may_says_so_and_leaves_nothing_behind(
        self, connect: Connect, object_store: ObjectStore
    ) -> None:
        bucket = f"new-{object_store.prefix[5:25]}"
        async with connect(bucket=bucket, create_bucket=True) as store:
            with capture_logs() as logs:
                await store.check()
            await store.ready()

        assert [(entry["event"], entry["bucket"]) for entry in logs] == [("bucket created", bucket)]
        assert object_store.keys(bucket=bucket) == []

    async def test_it_is_content_with_a_bucket_that_is_there(self, connect: Connect) -> None:
        async with connect() as store:
            with capture_logs() as logs:
                await store.check()
        assert logs == []

    @pytest.mark.parametrize(
        ("keys", "hint"),
        [
            ({"access_key": "stranger"}, "InvalidAccessKeyId (check AWS_ACCESS_KEY_ID)"),
            ({"secret_key": "wrong"}, "SignatureDoesNotMatch (check AWS_SECRET_ACCESS_KEY)"),
        ],
        ids=["unknown key", "wrong secret"],
    )
    async def test_wrong_keys_are_named_without_being_shown(
        self, connect: Connect, s3: SeaweedFS, keys: dict[str, str], hint: str
    ) -> None:
        async with connect(session=_session(s3, **keys)) as store:
            with pytest.raises(StorageUnavailable) as caught:
                await store.check()
        assert str(caught.value) == f"s3://{s3.bucket}/any: {hint}"

    async def test_without_keys_it_says_which_variables_to_set(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))

        with pytest.raises(StorageUnavailable, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            async with connect(session=boto3.Session()):
                pass

    async def test_a_bucket_that_went_away_makes_it_unready(self, connect: Connect) -> None:
        async with connect(bucket="never-made") as store:
            with pytest.raises(StorageUnavailable, match="s3://never-made: NoSuchBucket"):
                await store.ready()

    async def test_keys_that_may_not_delete_are_good_enough(self, connect: Connect, faulty: FaultyS3) -> None:
        async with connect(endpoint=faulty.endpoint) as store:
            refuse = faulty.fault(lambda r: s3_error(403, "AccessDenied") if r.method == "DELETE" else None)
            with refuse, capture_logs() as logs:
                await store.check()
        assert [(entry["event"], entry["reason"]) for entry in logs] == [
            ("start-up check leaves an object", "AccessDenied")
        ]


class TestWhatMayPass:
    async def test_a_few_refusals_are_waited_out(self, connect: Connect, faulty: FaultyS3) -> None:
        refusals = [s3_error(503, "SlowDown"), s3_error(500, "InternalError")]
        async with connect(endpoint=faulty.endpoint) as store:
            with faulty.fault(lambda _: refusals.pop() if refusals else None):
                assert await store.find("t1") is None
        assert len(faulty.requests) == 3

    async def test_an_outage_ends_in_an_error_that_names_bucket_and_code(
        self, connect: Connect, faulty: FaultyS3, s3: SeaweedFS, s3_prefix: str
    ) -> None:
        async with connect(endpoint=faulty.endpoint, retry_s=0.5) as store:
            with faulty.fault(lambda _: s3_error(503, "SlowDown")), pytest.raises(StorageUnavailable) as caught:
                await store.find("t1")
        place = f"s3://{s3.bucket}/{s3_prefix}/t1/manifest.json"
        assert str(caught.value) == f"{place}: SlowDown; gave up after 0.5 s"

    async def test_a_refusal_that_stays_is_not_asked_for_twice(self, connect: Connect, faulty: FaultyS3) -> None:
        async with connect(endpoint=faulty.endpoint) as store:
            with faulty.fault(lambda _: s3_error(403, "AccessDenied")), pytest.raises(StorageRefused) as caught:
                await store.commit(TerminalRecord(make_manifest(make_job(task_id="t1"))))
        assert str(caught.value).endswith("/t1/manifest.json: AccessDenied (these keys may not do that here)")
        assert len(faulty.requests) == 1

    async def test_a_server_that_dies_and_returns_is_waited_for(self, own_s3: SeaweedFS, tmp_path: Path) -> None:
        track = make_track(tmp_path / "a.wav")
        async with _store(own_s3, "jobs", _session(own_s3), retry_s=WITHIN_S) as store:
            await store.check()
            own_s3.kill()
            waiting = asyncio.create_task(store.put(make_job(), make_rendering(track)))
            await asyncio.to_thread(own_s3.start)
            (stored,) = await waiting
        assert stored.bytes == len(track.path.read_bytes())

    async def test_a_server_that_is_gone_is_an_error_without_its_address(self, own_s3: SeaweedFS) -> None:
        async with _store(own_s3, "jobs", _session(own_s3), retry_s=0.3) as store:
            own_s3.kill()
            with pytest.raises(StorageUnavailable) as caught:
                await store.ready()
        assert "127.0.0.1" not in str(caught.value)
        assert "ClientConnectorError (no connection; check ACESTEP_S3_ENDPOINT)" in str(caught.value)


class TestLargeSongsInTrouble:
    async def test_a_part_that_fails_once_is_sent_again(
        self, connect: Connect, faulty: FaultyS3, tmp_path: Path
    ) -> None:
        failures = [s3_error(503, "SlowDown")]
        track = make_track(tmp_path / "a.wav", b"p" * (PART_BYTES + 1))
        async with connect(endpoint=faulty.endpoint) as store:
            with faulty.fault(lambda r: failures.pop() if r.query.get("partNumber") == "2" and failures else None):
                (stored,) = await store.put(make_job(), make_rendering(track))
        assert stored.bytes == PART_BYTES + 1
        assert sum("partNumber=1" in path for _, path in faulty.requests) == 1

    async def test_a_part_that_stays_refused_leaves_no_open_upload(
        self, connect: Connect, faulty: FaultyS3, object_store: ObjectStore, tmp_path: Path
    ) -> None:
        track = make_track(tmp_path / "a.wav", b"p" * (PART_BYTES + 1))
        async with connect(endpoint=faulty.endpoint) as store:
            refuse = faulty.fault(lambda r: s3_error(403, "AccessDenied") if r.query.get("partNumber") == "2" else None)
            with refuse, pytest.raises(StorageRefused, match="AccessDenied"):
                await store.put(make_job(), make_rendering(track))

            await eventually(lambda: not object_store.open_uploads())
        assert object_store.keys() == []

    async def test_a_lost_answer_to_the_last_call_still_gives_the_song(
        self, connect: Connect, faulty: FaultyS3, tmp_path: Path
    ) -> None:
        track = make_track(tmp_path / "a.wav", b"p" * (PART_BYTES + 1))
        faulty.lose_answer_once(lambda r: r.method == "POST" and "uploadId" in r.query)
        async with connect(endpoint=faulty.endpoint) as store:
            (stored,) = await store.put(make_job(), make_rendering(track))
        assert stored.sha256 == hashlib.sha256(track.path.read_bytes()).hexdigest()


class TestLostAnswers:
    async def test_a_song_whose_answer_was_lost_is_our_own(
        self, connect: Connect, faulty: FaultyS3, tmp_path: Path
    ) -> None:
        track = make_track(tmp_path / "a.wav", b"sent once", seed=5)
        faulty.lose_answer_once(_is_put)
        async with connect(endpoint=faulty.endpoint) as store:
            (stored,) = await store.put(make_job(), make_rendering(track))
        assert (stored.track, stored.bytes) == (track, 9)

    async def test_a_manifest_whose_answer_was_lost_is_our_own(self, connect: Connect, faulty: FaultyS3) -> None:
        manifest = make_manifest(make_job())
        faulty.lose_answer_once(_is_put)
        async with connect(endpoint=faulty.endpoint) as store:
            assert (await store.commit(TerminalRecord(manifest, "m1"))).ending == manifest


class TestStoresWithoutConditionalWrites:
    async def test_one_that_refuses_them_is_served_with_one_warning(self, connect: Connect, faulty: FaultyS3) -> None:
        job = make_job()
        refuse = faulty.fault(lambda r: s3_error(501, "NotImplemented") if "If-None-Match" in r.headers else None)
        async with connect(endpoint=faulty.endpoint) as store:
            with refuse, capture_logs() as logs:
                first = await store.commit(TerminalRecord(make_manifest(job, worker_id="first"), "first"))
                second = await store.commit(TerminalRecord(make_manifest(job, worker_id="second"), "second"))
        assert first == second
        assert [entry["event"] for entry in logs] == ["storage has no conditional writes"]

    async def test_one_that_ignores_them_is_found_out_at_start(self, connect: Connect, faulty: FaultyS3) -> None:
        faulty.ignore_conditions = True
        job = make_job()
        async with connect(endpoint=faulty.endpoint) as store:
            with capture_logs() as logs:
                await store.check()
            first = await store.commit(TerminalRecord(make_manifest(job, worker_id="first"), "first"))
            second = await store.commit(TerminalRecord(make_manifest(job, worker_id="second"), "second"))
        assert first == second
        assert [entry["event"] for entry in logs] == ["storage has no conditional writes"]


class TestManifestsThatAreNone:
    @pytest.mark.parametrize(
        ("body", "said"),
        [(b"{}", "is not a manifest that can be read"), (None, "is the manifest of another task, elsewhere")],
        ids=["not one", "another's"],
    )
    async def test_the_error_names_the_key(
        self, connect: Connect, object_store: ObjectStore, body: bytes | None, said: str
    ) -> None:
        other = make_manifest(make_job(task_id="elsewhere")).model_dump_json().encode()
        object_store.put("t1/manifest.json", other if body is None else body)
        async with connect() as store:
            with pytest.raises(StorageUnavailable) as caught:
                await store.find("t1")
        assert str(caught.value) == f"s3://{object_store.bucket}/{object_store.prefix}/t1/manifest.json {said}"
