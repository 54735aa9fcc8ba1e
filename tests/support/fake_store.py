# SPDX-License-Identifier: Apache-2.0
"""An object storage in memory that behaves as S3 does, and a store on it; the contract tests hold them to that."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageRefused, StorageUnavailable
from acestep_consumer.domain.objects import ByteRange, ObjectAddress, ObjectContent, ObjectHead, SmallObject, Traffic
from acestep_consumer.storage.results import ResultStore


@dataclass
class FakeStream:
    """``ports.ObjectStream`` of bytes in memory."""

    size: int
    body: bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.body), 1 << 20):
            yield self.body[start : start + (1 << 20)]


@dataclass
class FakeObjects:
    """``ports.Objects`` without a server. ``down`` makes every call fail, as an outage that outlasts all retries.

    ``objects`` are all objects by key, for a test to look at; ``buckets`` those that exist.
    """

    down: bool = False
    objects: dict[ObjectAddress, SmallObject] = field(default_factory=dict)
    buckets: set[str] = field(default_factory=lambda: {"acestep"})
    traffic: Traffic = field(default_factory=Traffic)

    async def get(self, address: ObjectAddress) -> SmallObject | None:
        self._answer()
        return self.objects.get(address)

    @asynccontextmanager
    async def open(self, address: ObjectAddress, span: ByteRange | None = None) -> AsyncIterator[FakeStream]:
        self._answer()
        if address not in self.objects:
            raise StorageRefused(address, "NoSuchKey", missing=True)
        body = self.objects[address].body
        if span and span.first >= len(body):
            raise StorageRefused(address, "InvalidRange")
        yield FakeStream(len(body), body[span.first : span.last + 1] if span else body)

    async def head(self, address: ObjectAddress) -> ObjectHead | None:
        self._answer()
        found = self.objects.get(address)
        if found is None:
            return None
        etag = f'"{sha256(found.body).hexdigest()}"'
        return ObjectHead(size=len(found.body), etag=etag, metadata=found.metadata)

    async def put(self, address: ObjectAddress, content: ObjectContent, *, only_new: bool = False) -> bool:
        self._answer()
        if address.bucket not in self.buckets:
            raise StorageRefused(address, "NoSuchBucket")
        if only_new and address in self.objects:
            return False
        body = content.body.read_bytes() if isinstance(content.body, Path) else content.body
        self.objects[address] = SmallObject(body, dict(content.metadata))
        return True

    async def delete(self, address: ObjectAddress) -> None:
        self._answer()
        self.objects.pop(address, None)

    async def list(self, prefix: ObjectAddress) -> AsyncIterator[ObjectAddress]:
        self._answer()
        for key in sorted(each.key for each in self.objects if each.bucket == prefix.bucket):
            if key.startswith(prefix.key):
                yield ObjectAddress(prefix.bucket, key)

    async def presign(self, address: ObjectAddress, lifetime_s: int) -> str:
        self._answer()
        return f"https://fake.example/{address.bucket}/{address.key}?expires={lifetime_s}"

    async def has_bucket(self, bucket: str) -> bool:
        self._answer()
        return bucket in self.buckets

    async def make_bucket(self, bucket: str) -> None:
        self._answer()
        self.buckets.add(bucket)

    async def check_conditions(self, address: ObjectAddress) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.down:
            raise StorageUnavailable("s3://fake: the store is down")


class FakeStore(ResultStore):
    """The product's store on objects in memory."""

    def __init__(self, *, down: bool = False) -> None:
        self.fake = FakeObjects(down=down)
        super().__init__(self.fake, StorageSettings())

    @property
    def objects(self) -> dict[ObjectAddress, SmallObject]:
        """All objects, manifests among them."""
        return self.fake.objects
