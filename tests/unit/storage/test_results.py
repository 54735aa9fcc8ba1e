# SPDX-License-Identifier: Apache-2.0
"""Keys, and the signature that requests to them carry, without a server."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import boto3
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.storage.results import object_key, track_name
from acestep_consumer.storage.s3_client import ObjectAddress, S3Connection, S3Payload, _Signer
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


@pytest.mark.parametrize(
    ("endpoint", "region", "bucket", "base"),
    [
        ("http://127.0.0.1:9000", "us-east-1", "songs", "http://127.0.0.1:9000/songs/"),
        ("https://minio.example/", "us-east-1", "songs", "https://minio.example/songs/"),
        (None, "us-west-2", "songs", "https://songs.s3.us-west-2.amazonaws.com/"),
        (None, "us-west-2", "has.dots", "https://s3.us-west-2.amazonaws.com/has.dots/"),
        (None, "cn-north-1", "songs", "https://songs.s3.cn-north-1.amazonaws.com.cn/"),
    ],
)
def test_a_bucket_is_addressed_as_its_store_wants_it(endpoint: str | None, region: str, bucket: str, base: str) -> None:
    """Path addressing for stores of one's own; on AWS the region's own endpoint, also for presigned URLs."""
    session = boto3.Session(aws_access_key_id="key", aws_secret_access_key="secret", region_name=region)
    connection = S3Connection(StorageSettings(endpoint=endpoint), session=session)
    connection.client = connection._make_client()
    assert connection._base(bucket) == base


def test_a_large_body_is_streamed_and_a_small_one_is_not() -> None:
    """Of a large body of bytes aiohttp warns, and warnings are errors here."""
    assert S3Payload(b"x").stream() == b"x"
    stream = S3Payload(bytes(2 << 20)).stream()
    assert not isinstance(stream, bytes | None)
    assert len(stream.read()) == 2 << 20


@given(body=st.binary(max_size=64))
def test_a_known_digest_gives_the_signature_that_botocore_computes_from_the_body(body: bytes) -> None:
    assert _authorization(_Signer, body) == _authorization(S3SigV4Auth, body)


def _authorization(auth: type[S3SigV4Auth], body: bytes) -> str:
    request = AWSRequest("PUT", "http://127.0.0.1:9000/bucket/a%20key", headers={"x-amz-meta-seed": "7"}, data=body)
    request.context["sha256"] = hashlib.sha256(body).hexdigest()
    with patch("botocore.auth.get_current_datetime", return_value=datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)):
        auth(ReadOnlyCredentials("key", "secret", None), "s3", "us-east-1").add_auth(request)
    return str(request.headers["Authorization"])
