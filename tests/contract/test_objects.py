# SPDX-License-Identifier: Apache-2.0
"""The behaviour of every ``ports.Objects``, shown by the fake in memory and by the S3 adapter with a real server."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import pytest

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageRefused, StorageUnavailable
from acestep_consumer.domain.objects import ByteRange, ObjectAddress, ObjectContent
from acestep_consumer.domain.ports import Objects
from acestep_consumer.storage.s3.objects import S3Objects
from infra.local.s3 import SeaweedFS
from tests.support.fake_store import FakeObjects

PART_BYTES = 5 << 20  # the smallest that S3 takes


@pytest.fixture(scope="module")
def session(s3: SeaweedFS) -> boto3.Session:
    """One for all tests: it takes a third of a second to read its description of S3."""
    return boto3.Session(aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key)


@dataclass(frozen=True)
class StorageUnderTest:
    """A storage, and a prefix in it that is this test's own."""

    objects: Objects
    bucket: str
    prefix: str

    def at(self, name: str) -> ObjectAddress:
        return ObjectAddress(self.bucket, f"{self.prefix}/{name}")

    async def body(self, name: str) -> bytes | None:
        found = await self.objects.get(self.at(name))
        return None if found is None else found.body


@pytest.fixture(params=["fake", "s3"])
async def place(request: pytest.FixtureRequest, s3_prefix: str) -> AsyncIterator[StorageUnderTest]:
    if request.param == "fake":
        yield StorageUnderTest(FakeObjects(), "acestep", s3_prefix)
        return
    server: SeaweedFS = request.getfixturevalue("s3")
    settings = StorageSettings(endpoint=server.endpoint, bucket=server.bucket)
    async with S3Objects(settings, session=request.getfixturevalue("session"), retry_s=5) as objects:
        objects.part_bytes = PART_BYTES
        yield StorageUnderTest(objects, server.bucket, s3_prefix)


def text(body: bytes, **metadata: str) -> ObjectContent:
    return ObjectContent.of(body, "text/plain", metadata)


def file(path: Path, body: bytes, **metadata: str) -> ObjectContent:
    path.write_bytes(body)
    return replace(ObjectContent.of(body, "audio/wav", metadata), body=path)


async def read(objects: Objects, address: ObjectAddress, span: ByteRange | None = None) -> tuple[int, bytes]:
    async with objects.open(address, span) as stream:
        return stream.size, b"".join([chunk async for chunk in stream])


class TestObjects:
    async def test_an_object_is_read_as_it_was_written_with_its_metadata(self, place: StorageUnderTest) -> None:
        assert await place.objects.put(place.at("a"), text(b"hello", seed="7"))
        found = await place.objects.get(place.at("a"))
        assert found is not None
        assert (found.body, found.metadata) == (b"hello", {"seed": "7"})

    async def test_an_object_is_replaced_only_as_long_as_it_is_the_one_that_was_read(
        self, place: StorageUnderTest
    ) -> None:
        await place.objects.put(place.at("a"), text(b"one"))
        found = await place.objects.get(place.at("a"))
        assert found is not None
        assert await place.objects.replace(place.at("a"), text(b"two"), found.etag)
        assert not await place.objects.replace(place.at("a"), text(b"three"), found.etag)
        now = await place.objects.get(place.at("a"))
        assert now is not None
        assert now.body == b"two"

    async def test_a_missing_object_is_none_to_get_and_to_head_and_refused_to_open(
        self, place: StorageUnderTest
    ) -> None:
        assert await place.objects.get(place.at("none")) is None
        assert await place.objects.head(place.at("none")) is None
        with pytest.raises(StorageRefused) as caught:
            await read(place.objects, place.at("none"))
        assert (caught.value.reason, caught.value.missing) == ("NoSuchKey", True)

    async def test_a_head_tells_size_and_metadata_and_its_tag_changes_with_the_content(
        self, place: StorageUnderTest
    ) -> None:
        await place.objects.put(place.at("a"), text(b"hello", seed="7"))
        first = await place.objects.head(place.at("a"))
        await place.objects.put(place.at("a"), text(b"other", seed="7"))
        second = await place.objects.head(place.at("a"))
        assert first is not None
        assert second is not None
        assert (first.size, first.metadata) == (second.size, second.metadata) == (5, {"seed": "7"})
        assert "" != first.etag != second.etag

    async def test_only_new_leaves_an_object_that_exists(self, place: StorageUnderTest) -> None:
        assert await place.objects.put(place.at("a"), text(b"first"), only_new=True)
        assert not await place.objects.put(place.at("a"), text(b"second"), only_new=True)
        assert await place.body("a") == b"first"
        assert await place.objects.put(place.at("a"), text(b"third"))
        assert await place.body("a") == b"third"

    async def test_of_many_that_write_only_new_at_once_one_does(self, place: StorageUnderTest) -> None:
        contents = [text(bytes([number])) for number in range(8)]
        written = await asyncio.gather(
            *(place.objects.put(place.at("a"), content, only_new=True) for content in contents)
        )
        assert sum(written) == 1
        assert await place.body("a") == contents[written.index(True)].body

    @pytest.mark.parametrize("size", [0, 1, (3 << 20) + 5, 2 * PART_BYTES + 5], ids=str)
    @pytest.mark.parametrize("only_new", [False, True])
    async def test_a_file_of_any_size_arrives_whole(
        self, place: StorageUnderTest, tmp_path: Path, size: int, *, only_new: bool
    ) -> None:
        body = os.urandom(size)
        content = file(tmp_path / "song", body, seed="7")
        assert await place.objects.put(place.at("song.wav"), content, only_new=only_new)
        assert await read(place.objects, place.at("song.wav")) == (size, body)
        head = await place.objects.head(place.at("song.wav"))
        assert head is not None
        assert (head.size, head.metadata) == (size, {"seed": "7"})

    @pytest.mark.parametrize("size", [5, PART_BYTES + 5], ids=["whole", "in parts"])
    async def test_only_new_leaves_an_object_that_exists_whatever_the_size(
        self, place: StorageUnderTest, tmp_path: Path, size: int
    ) -> None:
        await place.objects.put(place.at("song.wav"), text(b"first"))
        content = file(tmp_path / "song", os.urandom(size))
        assert not await place.objects.put(place.at("song.wav"), content, only_new=True)
        assert await place.body("song.wav") == b"first"

    @pytest.mark.parametrize(
        ("span", "expected"),
        [(ByteRange(0, 0), b"0"), (ByteRange(3, 5), b"345"), (ByteRange(9, 9), b"9"), (ByteRange(8, 99), b"89")],
        ids=str,
    )
    async def test_a_range_is_read_alone_and_the_size_is_that_of_the_whole(
        self, place: StorageUnderTest, span: ByteRange, expected: bytes
    ) -> None:
        await place.objects.put(place.at("a"), text(b"0123456789"))
        assert await read(place.objects, place.at("a"), span) == (10, expected)

    async def test_a_range_behind_the_end_is_refused(self, place: StorageUnderTest) -> None:
        await place.objects.put(place.at("a"), text(b"0123456789"))
        with pytest.raises(StorageRefused, match="InvalidRange"):
            await read(place.objects, place.at("a"), ByteRange(10, 11))

    async def test_a_stream_may_be_left_before_its_end(self, place: StorageUnderTest, tmp_path: Path) -> None:
        body = os.urandom(6 << 20)
        await place.objects.put(place.at("song.wav"), file(tmp_path / "song", body))
        async with place.objects.open(place.at("song.wav")) as stream:
            async for chunk in stream:
                assert 0 < len(chunk) <= 1 << 20
                assert body.startswith(chunk)
                break
        assert (await read(place.objects, place.at("song.wav")))[1] == body

    async def test_a_deleted_object_is_gone_and_deleting_it_again_is_no_error(self, place: StorageUnderTest) -> None:
        await place.objects.put(place.at("a"), text(b"hello"))
        await place.objects.delete(place.at("a"))
        await place.objects.delete(place.at("a"))
        assert await place.body("a") is None

    async def test_a_listing_has_every_object_under_the_prefix_in_order_and_no_other(
        self, place: StorageUnderTest
    ) -> None:
        names = ["b/1", "b/10", "b/2", "a", "bc"]
        await asyncio.gather(*(place.objects.put(place.at(name), text(b"x")) for name in names))
        assert [each async for each in place.objects.list(place.at("b/"))] == [
            place.at("b/1"),
            place.at("b/10"),
            place.at("b/2"),
        ]
        assert [each async for each in place.objects.list(place.at("none"))] == []

    async def test_keys_may_hold_what_urls_may_not(self, place: StorageUnderTest) -> None:
        await place.objects.put(place.at("ä song+1 &?#.mp3"), text(b"hello"))
        assert await read(place.objects, place.at("ä song+1 &?#.mp3")) == (5, b"hello")
        assert [each async for each in place.objects.list(place.at("ä"))] == [place.at("ä song+1 &?#.mp3")]

    async def test_a_bucket_can_be_made_once_and_again(self, place: StorageUnderTest) -> None:
        bucket = f"new-{place.prefix[5:25]}"
        assert not await place.objects.has_bucket(bucket)
        await place.objects.make_bucket(bucket)
        await place.objects.make_bucket(bucket)
        assert await place.objects.has_bucket(bucket)

    async def test_a_presigned_url_names_the_object(self, place: StorageUnderTest) -> None:
        assert place.at("a").key in await place.objects.presign(place.at("a"), 60)


async def test_a_listing_longer_than_a_page_goes_on(s3: SeaweedFS, session: boto3.Session, s3_prefix: str) -> None:
    settings = StorageSettings(endpoint=s3.endpoint, bucket=s3.bucket)
    async with S3Objects(settings, session=session, retry_s=5) as objects:
        names = [ObjectAddress(s3.bucket, f"{s3_prefix}/{number:04}") for number in range(1005)]
        await asyncio.gather(*(objects.put(name, text(b"x")) for name in names))
        assert [each async for each in objects.list(ObjectAddress(s3.bucket, s3_prefix))] == names


async def test_the_fake_can_be_down() -> None:
    with pytest.raises(StorageUnavailable):
        await FakeObjects(down=True).get(ObjectAddress("acestep", "any"))
