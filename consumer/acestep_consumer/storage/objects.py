# SPDX-License-Identifier: Apache-2.0
"""Objects in S3: read, written once, handed out. Owns what a conditional write means, and what large files need."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
from botocore.exceptions import BotoCoreError, ClientError

from acestep_consumer.storage.s3_client import (
    DEFAULT_REGION,
    NOTHING,
    ObjectAddress,
    Receiver,
    S3Connection,
    S3Payload,
    S3Refused,
    S3Response,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES: Final = 8 << 20

_log = structlog.get_logger(__name__)
_META: Final = "x-amz-meta-"
_FORBIDDEN: Final = 403
_NOT_FOUND: Final = 404
_PRECONDITION_FAILED: Final = 412
# What stores say that do not know conditional writes; some just ignore the condition.
_UNCONDITIONAL: Final = frozenset({"NotImplemented", "MethodNotAllowed", "501"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectContent:
    """What an object is to hold: bytes, or a file that is sent in parts. ``sha256`` is hexadecimal."""

    body: bytes | Path
    sha256: str
    content_type: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ObjectHead:
    """What S3 knows about an object besides its bytes. ``metadata`` has lower-case names without ``x-amz-meta-``."""

    bytes: int
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SmallObject:
    """A small object as it was read. ``metadata`` as in ``ObjectHead``."""

    body: bytes
    metadata: Mapping[str, str]


class Objects:
    """The calls that storage and inputs make. Each raises ``StorageUnavailable``; ``S3Refused`` when S3 says no."""

    def __init__(self, connection: S3Connection) -> None:
        self._s3 = connection
        self._conditional = True

    async def read(self, place: ObjectAddress) -> bytes | None:
        """Return a small object's bytes; None when there is none."""
        found = await self.find(place)
        return None if found is None else found.body

    async def find(self, place: ObjectAddress) -> SmallObject | None:
        """Return a small object with its metadata; None when there is none."""
        answer = await self._s3.ask("GET", place)
        if answer.ok:
            return SmallObject(answer.body, _metadata(answer))
        if answer.code in ("NoSuchKey", str(_NOT_FOUND)):
            return None
        raise S3Refused(place, answer.code)

    async def receive(self, place: ObjectAddress, receiver: Receiver) -> None:
        """Stream an object into ``receiver``, which is called anew for each attempt."""
        await self._s3.receive(place, receiver)

    async def head(self, place: ObjectAddress) -> ObjectHead | None:
        """Return size and metadata; None when there is no such object."""
        answer = await self._s3.ask("HEAD", place)
        if answer.status == _NOT_FOUND:
            return None
        _require_ok(place, answer)
        return ObjectHead(int(answer.headers["Content-Length"]), _metadata(answer))

    async def write(self, place: ObjectAddress, content: ObjectContent) -> None:
        """Write an object, in place of one that is there."""
        if isinstance(content.body, Path):
            await self._upload(place, content, content.body, only_new=False)
        else:
            _require_ok(place, await self._put(place, content, content.body))

    async def write_new(self, place: ObjectAddress, content: ObjectContent) -> bool:
        """Write an object unless one is there.

        Returns:
            False when one is there. It may be our own, written by an attempt whose answer was lost.
        """
        if isinstance(content.body, Path):
            return await self._upload(place, content, content.body, only_new=True)
        if self._conditional:
            answer = await self._put(place, content, content.body, {"If-None-Match": "*"})
            if answer.ok or answer.status == _PRECONDITION_FAILED:
                return answer.ok
            self._give_up_conditions(place, answer.code)
        if await self.head(place) is not None:
            return False
        _require_ok(place, await self._put(place, content, content.body))
        return True

    async def delete(self, place: ObjectAddress) -> None:
        """Delete an object; a missing one is no error."""
        answer = await self._s3.ask("DELETE", place)
        if answer.status != _NOT_FOUND:
            _require_ok(place, answer)

    async def presign(self, place: ObjectAddress, lifetime_s: int) -> str:
        """Return a URL that lets whoever has it read the object for ``lifetime_s`` seconds."""
        names = {"Bucket": place.bucket, "Key": place.key}
        sign = partial(self._s3.client.generate_presigned_url, "get_object", Params=names, ExpiresIn=lifetime_s)
        return await self._s3.call(place, sign)

    async def has_bucket(self, bucket: str) -> bool:
        """Whether the bucket is there and lets us in: the cheapest question that needs valid keys."""
        answer = await self._s3.ask("HEAD", ObjectAddress(bucket))
        if answer.status == _FORBIDDEN:
            await self.read(ObjectAddress(bucket, "any"))  # fails as well, and says why: the answer to HEAD has no body
        if answer.status != _NOT_FOUND:
            _require_ok(ObjectAddress(bucket), answer)
        return answer.ok

    async def make_bucket(self, bucket: str) -> None:
        """Make a bucket; one that we own already is no error."""
        arguments: Any = {"Bucket": bucket}
        if self._s3.endpoint is None and self._s3.region != DEFAULT_REGION:
            arguments["CreateBucketConfiguration"] = {"LocationConstraint": self._s3.region}
        try:
            await self._s3.call(ObjectAddress(bucket), partial(self._s3.client.create_bucket, **arguments))
        except S3Refused as error:
            if error.s3_code != "BucketAlreadyOwnedByYou":
                raise

    async def try_conditions(self, place: ObjectAddress) -> None:
        """Learn at ``place``, where an object lies, whether this store honours conditional writes."""
        nothing = ObjectContent(body=NOTHING.body, sha256=NOTHING.sha256, content_type="text/plain")
        if await self.write_new(place, nothing):
            self._give_up_conditions(place, "NotImplemented")

    async def _put(
        self, place: ObjectAddress, content: ObjectContent, body: bytes, condition: Mapping[str, str] | None = None
    ) -> S3Response:
        metadata = {_META + name: value for name, value in content.metadata.items()}
        headers = {"Content-Type": content.content_type, **metadata, **(condition or {})}
        return await self._s3.ask("PUT", place, S3Payload(body, content.sha256), headers)

    async def _upload(self, place: ObjectAddress, content: ObjectContent, file: Path, *, only_new: bool) -> bool:
        names: Any = {"Bucket": place.bucket, "Key": place.key}
        created = await self._s3.call(
            place,
            partial(
                self._s3.client.create_multipart_upload,
                **names,
                ContentType=content.content_type,
                Metadata=dict(content.metadata),
            ),
        )
        names["UploadId"] = created["UploadId"]
        written = False
        try:
            parts = await self._send_parts(place, names, file)
            written = await self._finish(place, names, parts, only_new=only_new)
        finally:
            if not written:
                # The parts of an open upload are stored, and paid for, until someone ends it.
                self._s3.submit(partial(self._abort, names))
        return written

    async def _send_parts(self, place: ObjectAddress, names: Any, file: Path) -> "list[CompletedPartTypeDef]":
        size = (await asyncio.to_thread(file.stat)).st_size
        parts: list[CompletedPartTypeDef] = []
        for number, offset in enumerate(range(0, size, PART_BYTES), start=1):
            etag = await self._s3.call(place, partial(self._send_part, names, file, number, offset))
            self._s3.traffic.sent_bytes += min(PART_BYTES, size - offset)
            parts.append({"PartNumber": number, "ETag": etag})
        return parts

    def _send_part(self, names: Any, file: Path, number: int, offset: int) -> str:
        with file.open("rb") as stream:
            stream.seek(offset)
            body = stream.read(PART_BYTES)
        return self._s3.client.upload_part(**names, PartNumber=number, Body=body)["ETag"]

    async def _finish(
        self, place: ObjectAddress, names: Any, parts: "list[CompletedPartTypeDef]", *, only_new: bool
    ) -> bool:
        finish = partial(self._s3.client.complete_multipart_upload, **names, MultipartUpload={"Parts": parts})
        if only_new and self._conditional:
            try:
                await self._s3.call(place, partial(finish, IfNoneMatch="*"))
            except S3Refused as error:
                # An upload that is gone was finished by an attempt whose answer was lost.
                if error.s3_code in ("PreconditionFailed", "NoSuchUpload"):
                    return False
                self._give_up_conditions(place, error.s3_code)
            else:
                return True
        if only_new and await self.head(place) is not None:
            return False
        await self._s3.call(place, finish)
        return True

    def _abort(self, names: Any) -> None:
        with suppress(BotoCoreError, ClientError):
            self._s3.client.abort_multipart_upload(**names)

    def _give_up_conditions(self, place: ObjectAddress, code: str) -> None:
        """Look before each write from now on, when the store has no conditional writes; raise for any other code."""
        if code not in _UNCONDITIONAL:
            raise S3Refused(place, code)
        if self._conditional:
            self._conditional = False
            _log.warning(
                "storage.no_conditional_writes",
                bucket=place.bucket,
                risk="two workers that finish the same task in the same moment both write",
            )


def _metadata(answer: S3Response) -> dict[str, str]:
    return {name.lower().removeprefix(_META): value for name, value in answer.headers.items()}


def _require_ok(place: ObjectAddress, answer: S3Response) -> None:
    if not answer.ok:
        raise S3Refused(place, answer.code)
