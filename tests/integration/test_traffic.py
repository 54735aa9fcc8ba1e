# SPDX-License-Identifier: Apache-2.0
"""What the line to S3 counts, against a real S3 server."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import boto3
import pytest

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.storage.objects import PART_BYTES, ObjectContent, Objects
from acestep_consumer.storage.s3_client import ObjectAddress, S3Connection
from infra.local.s3 import SeaweedFS
from tests.support.faulty_s3 import FaultyS3, s3_error


@pytest.fixture
async def line(s3: SeaweedFS) -> AsyncIterator[tuple[S3Connection, FaultyS3]]:
    """A connection through a front that can misbehave."""
    session = boto3.Session(s3.access_key, s3.secret_key, region_name="us-east-1")
    async with FaultyS3(s3.endpoint) as front:
        settings = StorageSettings.model_validate({"endpoint": front.endpoint, "bucket": s3.bucket})
        async with S3Connection(settings, session=session, patience_s=10) as connection:
            yield connection, front


def content(body: bytes | Path, of: bytes) -> ObjectContent:
    return ObjectContent(body=body, sha256=hashlib.sha256(of).hexdigest(), content_type="text/plain")


async def test_bytes_of_small_and_of_large_objects_count_once_each_way(
    line: tuple[S3Connection, FaultyS3], s3: SeaweedFS, s3_prefix: str, tmp_path: Path
) -> None:
    connection, _ = line
    objects, large = Objects(connection), tmp_path / "large"
    large.write_bytes(b"x" * (PART_BYTES + 5))
    await objects.write(ObjectAddress(s3.bucket, f"{s3_prefix}/small"), content(b"abc", b"abc"))
    await objects.write(ObjectAddress(s3.bucket, f"{s3_prefix}/large"), content(large, large.read_bytes()))
    assert connection.traffic.sent_bytes == 3 + PART_BYTES + 5

    async def take(chunks: AsyncIterator[bytes]) -> None:
        async for _ in chunks:
            pass

    before = connection.traffic.received_bytes
    assert await objects.read(ObjectAddress(s3.bucket, f"{s3_prefix}/small")) == b"abc"
    await objects.receive(ObjectAddress(s3.bucket, f"{s3_prefix}/large"), take)
    assert connection.traffic.received_bytes - before == 3 + PART_BYTES + 5
    assert connection.traffic.retries == 0


async def test_each_try_after_the_first_counts(
    line: tuple[S3Connection, FaultyS3], s3: SeaweedFS, s3_prefix: str
) -> None:
    connection, front = line
    refusals = [s3_error(503, "SlowDown"), s3_error(500, "InternalError")]
    with front.fault(lambda _: refusals.pop() if refusals else None):
        await Objects(connection).write(ObjectAddress(s3.bucket, f"{s3_prefix}/late"), content(b"abc", b"abc"))
    assert connection.traffic.retries == 2
