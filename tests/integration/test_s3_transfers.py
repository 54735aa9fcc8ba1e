# SPDX-License-Identifier: Apache-2.0
"""Transfers of the S3 adapter, against a real S3 server: what is counted, resumed after a cut, and given up on."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import pytest
from aiohttp import web

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageRefused, StorageUnavailable
from acestep_consumer.domain.objects import ByteRange, ObjectAddress, ObjectContent
from acestep_consumer.storage.s3 import client
from acestep_consumer.storage.s3.objects import S3Objects
from infra.local.s3 import SeaweedFS
from tests.support.faulty_s3 import FaultyS3, s3_error
from tests.support.waiting import eventually

PART_BYTES = 5 << 20  # the smallest that S3 takes
SONG = os.urandom(3 << 20)


@dataclass(frozen=True)
class ProxiedObjects:
    """Objects through a front that can misbehave, and the address of one that only this test uses."""

    objects: S3Objects
    front: FaultyS3
    address: ObjectAddress

    async def read(self, span: ByteRange | None = None) -> bytes:
        async with self.objects.open(self.address, span) as stream:
            return b"".join([chunk async for chunk in stream])


@pytest.fixture
async def line(s3: SeaweedFS, s3_prefix: str) -> AsyncIterator[ProxiedObjects]:
    session = boto3.Session(s3.access_key, s3.secret_key, region_name="us-east-1")
    async with FaultyS3(s3.endpoint) as front:
        settings = StorageSettings.model_validate({"endpoint": front.endpoint, "bucket": s3.bucket})
        async with S3Objects(settings, session=session, retry_s=5) as objects:
            objects.part_bytes = PART_BYTES
            yield ProxiedObjects(objects, front, ObjectAddress(s3.bucket, f"{s3_prefix}/song"))


def text(body: bytes) -> ObjectContent:
    return ObjectContent.of(body, "text/plain")


def file(path: Path, body: bytes) -> ObjectContent:
    path.write_bytes(body)
    return replace(text(body), body=path)


def is_get(request: web.Request) -> bool:
    return request.method == "GET"


async def test_bytes_of_small_and_of_large_objects_count_once_each_way(line: ProxiedObjects, tmp_path: Path) -> None:
    traffic, small = line.objects.traffic, replace(line.address, key=f"{line.address.key}-small")
    await line.objects.put(small, text(b"abc"))
    await line.objects.put(line.address, file(tmp_path / "large", b"x" * (PART_BYTES + 5)))
    assert traffic.sent_bytes == 3 + PART_BYTES + 5

    before = traffic.received_bytes
    assert await line.objects.get(small) is not None
    await line.read()
    assert traffic.received_bytes - before == 3 + PART_BYTES + 5
    assert traffic.retries == 0


async def test_each_attempt_after_the_first_counts(line: ProxiedObjects) -> None:
    refusals = [s3_error(503, "SlowDown"), s3_error(500, "InternalError")]
    with line.front.fault(lambda _: refusals.pop() if refusals else None):
        await line.objects.put(line.address, text(b"abc"))
    assert line.objects.traffic.retries == 2


async def test_a_file_of_up_to_a_part_is_one_request_and_a_larger_one_is_not(
    line: ProxiedObjects, tmp_path: Path
) -> None:
    await line.objects.put(line.address, file(tmp_path / "song", b"x" * PART_BYTES), only_new=True)
    assert [method for method, _ in line.front.requests] == ["PUT"]
    line.front.requests.clear()
    await line.objects.put(line.address, file(tmp_path / "song", b"x" * (PART_BYTES + 1)))
    assert [method for method, _ in line.front.requests] == ["POST", "PUT", "PUT", "POST"]


async def test_a_read_that_is_cut_goes_on_where_it_stopped(line: ProxiedObjects) -> None:
    await line.objects.put(line.address, text(SONG))
    line.front.cut_answers(is_get, after=1_000_000, times=2)
    assert await line.read() == SONG
    assert line.objects.traffic.received_bytes == len(SONG)
    assert line.objects.traffic.retries == 2
    asked = [headers.get("Range") for headers in line.front.headers_of("GET")]
    assert asked == [None, "bytes=1000000-", "bytes=2000000-"]


async def test_a_range_that_is_cut_goes_on_where_it_stopped(line: ProxiedObjects) -> None:
    await line.objects.put(line.address, text(SONG))
    line.front.cut_answers(is_get, after=1_000, times=1)
    assert await line.read(ByteRange(500, 9_999)) == SONG[500:10_000]


async def test_the_rest_of_an_object_that_was_replaced_meanwhile_is_not_read(line: ProxiedObjects) -> None:
    await line.objects.put(line.address, text(SONG))
    line.front.cut_answers(is_get, after=1_000, times=1)
    async with line.objects.open(line.address) as stream:
        await line.objects.put(line.address, text(SONG[::-1]))
        with pytest.raises(StorageRefused, match="PreconditionFailed"):
            assert b"".join([chunk async for chunk in stream])


async def test_a_read_without_progress_is_given_up(line: ProxiedObjects) -> None:
    await line.objects.put(line.address, text(SONG))
    line.objects.client._retrying.stop = lambda state: state.attempt_number >= 3
    refuse = line.front.fault(lambda request: s3_error(503, "SlowDown") if is_get(request) else None)
    with refuse, pytest.raises(StorageUnavailable, match="SlowDown; gave up"):
        await line.read()
    assert len(line.front.headers_of("GET")) == 3


async def test_a_store_without_ranges_is_named_as_such(line: ProxiedObjects) -> None:
    whole = web.Response(body=SONG)
    ignore = line.front.fault(lambda request: whole if is_get(request) else None)
    with ignore, pytest.raises(StorageRefused, match="NoRanges"):
        await line.read(ByteRange(5, 10))


async def test_an_upload_that_the_server_stops_taking_is_sent_again(
    line: ProxiedObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its window stays closed, so that no answer and no error ever comes."""
    monkeypatch.setattr(client, "_READ_S", 0.3)
    line.objects.part_bytes = 64 << 20
    with line.front.hold(lambda request: request.method == "PUT") as hold:
        sending = asyncio.create_task(line.objects.put(line.address, file(tmp_path / "song", SONG * 8)))
        await eventually(lambda: hold.seen >= 2)
        monkeypatch.undo()
    await sending
    assert await line.read() == SONG * 8


@pytest.mark.parametrize("size", [100, PART_BYTES + 5], ids=["whole", "in parts"])
async def test_a_file_that_is_gone_is_no_outage_of_the_storage(line: ProxiedObjects, tmp_path: Path, size: int) -> None:
    """It would be waited for without end."""
    content = file(tmp_path / "song", b"x" * size)
    (tmp_path / "song").unlink()
    with pytest.raises(FileNotFoundError):
        await line.objects.put(line.address, content)
    assert line.objects.traffic.retries == 0
