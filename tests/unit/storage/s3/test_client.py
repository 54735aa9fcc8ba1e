# SPDX-License-Identifier: Apache-2.0
"""Addresses, signatures and bodies of requests to S3, without a server."""

import asyncio
import hashlib
import re
import threading
import time
from datetime import UTC, datetime
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import boto3
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.exceptions import ClientError, CredentialRetrievalError, PartialCredentialsError

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageMisconfigured, StorageUnavailable
from acestep_consumer.domain.objects import ObjectAddress
from acestep_consumer.storage.s3.client import CHUNK_BYTES, FilePart, S3Client, S3Payload, _Body, _Signer, sha256_of
from tests.support.answering import AMQP, answering
from tests.support.waiting import WITHIN_S, eventually


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
    client = S3Client(StorageSettings(endpoint=endpoint), session=session)
    client.boto3 = client._make_boto3_client()
    assert client._base(bucket) == base


KEYS = ReadOnlyCredentials("key", "secret", "token")
METADATA = {
    "Content-Type": "audio/wav",
    "x-amz-meta-seed": "7",
    "X-Amz-Meta-T": " two  words ",
    "If-None-Match": "*",
}


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9000", "https://minio.example", "http://[::1]:9000", None])
async def test_a_known_digest_gives_the_signature_that_botocore_computes_from_the_body(endpoint: str | None) -> None:
    session = boto3.Session(aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1")
    client = S3Client(StorageSettings(endpoint=endpoint), session=session)
    client.boto3 = client._make_boto3_client()
    client._signer, client._signer_until = _Signer(KEYS, "s3", "us-east-1"), inf
    bodies, place = (b"", b"song"), ObjectAddress("bucket", "a key/ü~.wav")
    ranged, part = {"Range": "bytes=3-", "If-Match": '"tag"'}, {"uploadId": "a/b=", "partNumber": "1"}
    with patch("botocore.auth.get_current_datetime", return_value=datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)):
        for body, headers, query in product(bodies, ({}, METADATA, ranged), ({}, part)):
            url, sent = await client._sign("PUT", place, hashlib.sha256(body).hexdigest(), headers, query)
            theirs = AWSRequest("PUT", str(url), headers=headers, data=body)
            S3SigV4Auth(KEYS, "s3", "us-east-1").add_auth(theirs)
            assert dict(sent) == {**dict(theirs.headers.items()), "Host": url.host_port_subcomponent}


class Wire:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    async def write(self, chunk: bytes) -> None:
        self.chunks.append(chunk)


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, 2 * CHUNK_BYTES + 7], ids=str)
@pytest.mark.parametrize("in_file", [True, False], ids=["of a file", "in memory"])
async def test_a_body_goes_out_in_chunks_from_its_start_at_every_attempt(
    tmp_path: Path, size: int, *, in_file: bool
) -> None:
    """So that a song, however large, takes a chunk of memory while it is sent."""
    body = hashlib.sha256(b"song").digest() * (size // 32 + 1)
    (tmp_path / "song").write_bytes(b"before" + body[:size] + b"after")
    part = FilePart(tmp_path / "song", len(b"before"), size) if in_file else body[:size]
    signs: list[None] = []
    payload = _Body(S3Payload(part, sha256_of(part)), lambda: signs.append(None))
    for _ in range(2):
        wire = Wire()
        signs.clear()
        await payload.write(wire)  # type: ignore[arg-type]  # all that it uses
        assert b"".join(wire.chunks) == body[:size]
        assert max(map(len, wire.chunks)) <= CHUNK_BYTES
        assert len(signs) == len(wire.chunks) + 1
    assert payload.size == size


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("http", "ClientResponseError (no HTTP; check the port in ACESTEP_S3_ENDPOINT)"),
        (
            "https",
            "ClientConnectorSSLError (does the endpoint speak TLS? if not, begin ACESTEP_S3_ENDPOINT with http://)",
        ),
    ],
)
async def test_an_endpoint_that_is_no_s3_server_is_told_with_the_setting(scheme: str, said: str) -> None:
    session = boto3.Session(aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1")
    async with answering(AMQP) as port:
        settings = StorageSettings.model_validate({"endpoint": f"{scheme}://127.0.0.1:{port}"})
        async with S3Client(settings, session=session, retry_s=0) as client:
            with pytest.raises(StorageUnavailable, match=re.escape(said)):
                await client.ask("GET", ObjectAddress("songs", "a"))


class SlowKeys:
    """A session whose keys take a moment, and are counted."""

    region_name = "us-east-1"

    def __init__(self, error: Exception | None = None) -> None:
        self.asked = 0
        self.error = error
        self.go = threading.Event()
        """While it is not set, they do not come."""
        self.go.set()

    def get_credentials(self) -> Any:
        self.asked += 1
        time.sleep(0.05)
        assert self.go.wait(WITHIN_S)
        if self.error is not None:
            raise self.error
        return Credentials("key", "secret")


async def test_many_requests_with_expired_keys_renew_them_once() -> None:
    keys = SlowKeys()
    client = S3Client(StorageSettings(endpoint="http://127.0.0.1:1"), session=cast("Any", keys))
    client._bases["b"] = "http://127.0.0.1:1/b/"
    for times in (1, 2):
        client._signer_until = 0.0
        await asyncio.gather(*(client._sign("GET", ObjectAddress("b", "k"), "", {}, {}) for _ in range(50)))
        assert keys.asked == times


async def test_a_request_that_is_cancelled_does_not_take_the_others_keys_away() -> None:
    keys = SlowKeys()
    client = S3Client(StorageSettings(endpoint="http://127.0.0.1:1"), session=cast("Any", keys))
    client._bases["b"] = "http://127.0.0.1:1/b/"
    first, second = (asyncio.create_task(client._sign("GET", ObjectAddress("b", "k"), "", {}, {})) for _ in range(2))
    keys.go.clear()
    await eventually(lambda: keys.asked)
    first.cancel()
    await asyncio.wait({first})
    keys.go.set()
    await second
    assert (first.cancelled(), keys.asked) == (True, 1)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ClientError({"Error": {"Code": "AccessDenied"}}, "AssumeRole"), StorageUnavailable),
        (FileNotFoundError(2, "No such file", "/var/run/token"), StorageUnavailable),
        (RuntimeError("credentials were refreshed, but are still expired"), StorageUnavailable),
        (PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"), StorageMisconfigured),
        (CredentialRetrievalError(provider="role", error_msg="no answer"), StorageUnavailable),
    ],
)
async def test_keys_that_cannot_be_read_are_an_outage_or_wrong_settings(
    error: Exception, kind: type[Exception]
) -> None:
    session = cast("Any", SlowKeys(error))
    client = S3Client(StorageSettings(endpoint="http://127.0.0.1:1"), session=session)
    for _ in range(2):  # and they are asked for again
        with pytest.raises(StorageUnavailable, match="the keys for S3 cannot be read") as caught:
            await client._sign("GET", ObjectAddress("b", "k"), "", {}, {})
        assert type(caught.value) is kind
    assert session.asked == 2


async def test_a_key_with_the_line_break_of_a_file_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """``echo key | base64`` puts it into many a secret; aiohttp refuses to send it."""
    monkeypatch.setattr(SlowKeys, "get_credentials", lambda _: Credentials("key\n", "secret"))
    client = S3Client(StorageSettings(endpoint="http://127.0.0.1:1"), session=cast("Any", SlowKeys()))
    with pytest.raises(StorageMisconfigured, match="AWS_ACCESS_KEY_ID or AWS_SESSION_TOKEN holds a line break"):
        await client._sign("GET", ObjectAddress("b", "k"), "", {}, {})


async def test_a_program_for_keys_that_does_not_exist_is_a_wrong_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[default]\ncredential_process = /nowhere/keys\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(StorageMisconfigured, match=r"AWS settings cannot be used: .*/nowhere/keys"):
        async with S3Client(StorageSettings(endpoint="http://127.0.0.1:1")):
            pass


async def test_keys_in_a_file_that_was_replaced_are_used_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary keys of a mounted secret, or of a cron job: botocore itself reads the file once."""
    file = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    client = S3Client(StorageSettings(endpoint="http://127.0.0.1:1"))
    client._bases["b"] = "http://127.0.0.1:1/b/"
    used = None
    for key, token in (("old", "t1"), ("new", "t2")):
        text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = {token}\n"
        file.write_text(text)
        client._signer_until = 0.0
        _, headers = await client._sign("GET", ObjectAddress("b", "k"), "", {}, {})
        assert f"Credential={key}/" in headers["Authorization"]
        assert headers["X-Amz-Security-Token"] == token
        used = used or client._make_boto3_client()
        link = used.generate_presigned_url("get_object", Params={"Bucket": "b", "Key": "k"})
        assert f"Credential={key}%2F" in link or f"AWSAccessKeyId={key}&" in link
