# SPDX-License-Identifier: Apache-2.0
"""``ports.Objects`` in S3: conditional writes, multipart uploads, reads that resume."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import aiohttp
import boto3
import structlog
from botocore.exceptions import BotoCoreError, ClientError

from acestep_consumer.config.http import NETWORK_ERRORS
from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageRefused
from acestep_consumer.domain.objects import ByteRange, ObjectAddress, ObjectContent, ObjectHead, SmallObject, Traffic
from acestep_consumer.storage.s3.client import (
    CHUNK_BYTES,
    DEFAULT_REGION,
    FilePart,
    S3Client,
    S3Payload,
    S3Response,
    network_failure,
    refused,
    sha256_of,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES: Final = 64 << 20
"""Larger files are sent in parts of this size: a part that fails is sent again alone. S3 takes 10,000 of them."""

log = structlog.get_logger()
_META: Final = "x-amz-meta-"
_FORBIDDEN: Final = 403
_NOT_FOUND: Final = 404
_PARTIAL: Final = 206
_PRECONDITION_FAILED: Final = 412
# The answers of stores that do not know conditional writes; some just ignore the condition.
_UNCONDITIONAL: Final = frozenset({"NotImplemented", "MethodNotAllowed", "501"})


class S3Objects:
    """``ports.Objects`` in S3. An async context manager; arguments as those of ``S3Client``."""

    def __init__(
        self,
        settings: StorageSettings,
        *,
        session: boto3.Session | None = None,
        retry_s: float = 30,
        read_s: float | None = None,
    ) -> None:
        self.client = S3Client(settings, session=session, retry_s=retry_s, read_s=read_s)
        self.part_bytes = PART_BYTES
        self._conditional = True

    async def __aenter__(self) -> Self:
        await self.client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.__aexit__(kind, error, trace)

    @property
    def traffic(self) -> Traffic:
        """Counts what all calls send and receive."""
        return self.client.traffic

    async def get(self, address: ObjectAddress) -> SmallObject | None:
        """Return a small object; None when there is none."""
        answer = await self.client.ask("GET", address)
        if answer.ok:
            return SmallObject(answer.body, _metadata(answer.headers), answer.headers.get("ETag", ""))
        error = refused(address, answer.code)
        if error.missing:
            return None
        raise error

    @asynccontextmanager
    async def open(self, address: ObjectAddress, span: ByteRange | None = None) -> AsyncIterator["S3Stream"]:
        """Open an object for reading, or ``span`` of it."""
        stream = S3Stream(self.client, address, span)
        try:
            await self.client.retry(address, stream.connect)
            yield stream
        finally:
            stream.close()

    async def head(self, address: ObjectAddress) -> ObjectHead | None:
        """Return what is known of an object; None when there is none."""
        answer = await self.client.ask("HEAD", address)
        if answer.status == _NOT_FOUND:
            return None
        _require_ok(address, answer)
        headers = answer.headers
        return ObjectHead(
            size=int(headers["Content-Length"]), etag=headers.get("ETag", ""), metadata=_metadata(headers)
        )

    async def replace(self, address: ObjectAddress, content: ObjectContent, etag: str) -> bool:
        """Write a small object in place of the one with this ETag. False: it is another one by now."""
        etag = etag if self._conditional else ""
        return await self._put_whole(address, content, {"If-Match": etag} if etag else {})

    async def put(self, address: ObjectAddress, content: ObjectContent, *, only_new: bool = False) -> bool:
        """Write an object; ``only_new``: unless one is there. Returns whether it was written."""
        put = self._put_parts if content.size > self.part_bytes else self._put_new
        if only_new and self._conditional:
            try:
                return await put(address, content, only_new=True)
            except StorageRefused as error:
                if error.reason not in _UNCONDITIONAL:
                    raise
                self._give_up_conditions(address)
        if only_new and await self.head(address) is not None:
            return False
        return await put(address, content, only_new=False)

    async def delete(self, address: ObjectAddress) -> None:
        """Delete an object; a missing one is no error."""
        answer = await self.client.ask("DELETE", address)
        if answer.status != _NOT_FOUND:
            _require_ok(address, answer)

    async def list(self, prefix: ObjectAddress) -> AsyncIterator[ObjectAddress]:
        """Yield the addresses of all objects whose key starts with that of ``prefix``, in the order of their keys."""
        more: Any = {"Bucket": prefix.bucket, "Prefix": prefix.key}
        while more:
            page = await self.client.call(prefix, partial(self.client.boto3.list_objects_v2, **more))
            for entry in page.get("Contents", ()):
                yield ObjectAddress(prefix.bucket, entry["Key"])
            token = page.get("NextContinuationToken")
            more = {**more, "ContinuationToken": token} if token else None

    async def presign(self, address: ObjectAddress, lifetime_s: int) -> str:
        """Return a URL that lets whoever has it read the object for ``lifetime_s`` seconds."""
        sign = self.client.boto3.generate_presigned_url
        return await self.client.call(
            address, partial(sign, "get_object", Params=_names(address), ExpiresIn=lifetime_s)
        )

    async def has_bucket(self, bucket: str) -> bool:
        """Whether the bucket exists and lets us in."""
        answer = await self.client.ask("HEAD", ObjectAddress(bucket))
        if answer.status == _FORBIDDEN:
            await self.get(ObjectAddress(bucket, "any"))  # fails as well, and says why: the answer to HEAD has no body
        if answer.status != _NOT_FOUND:
            _require_ok(ObjectAddress(bucket), answer)
        return answer.ok

    async def make_bucket(self, bucket: str) -> None:
        """Create a bucket; one that we own already is no error."""
        arguments: Any = {"Bucket": bucket}
        if self.client.endpoint is None and self.client.region != DEFAULT_REGION:
            arguments["CreateBucketConfiguration"] = {"LocationConstraint": self.client.region}
        try:
            await self.client.call(ObjectAddress(bucket), partial(self.client.boto3.create_bucket, **arguments))
        except StorageRefused as error:
            if error.reason != "BucketAlreadyOwnedByYou":
                raise

    async def check_conditions(self, address: ObjectAddress) -> None:
        """Find out, at an existing object, whether this store honours conditional writes; warn if not."""
        if await self.put(address, ObjectContent.of(b"", "text/plain"), only_new=True):
            self._give_up_conditions(address)

    async def _put_new(self, address: ObjectAddress, content: ObjectContent, *, only_new: bool) -> bool:
        return await self._put_whole(address, content, {"If-None-Match": "*"} if only_new else {})

    async def _put_whole(self, address: ObjectAddress, content: ObjectContent, condition: Mapping[str, str]) -> bool:
        body = _part(content, 0, content.size)
        metadata = {_META + name: value for name, value in content.metadata.items()}
        headers = {"Content-Type": content.content_type, **metadata, **condition}
        answer = await self.client.ask("PUT", address, S3Payload(body, content.sha256), headers)
        if condition and answer.status == _PRECONDITION_FAILED:
            return False
        _require_ok(address, answer)
        return True

    async def _put_parts(self, address: ObjectAddress, content: ObjectContent, *, only_new: bool) -> bool:
        boto3, names = self.client.boto3, _names(address)
        described: Any = {"ContentType": content.content_type, "Metadata": dict(content.metadata)}
        created = await self.client.call(address, partial(boto3.create_multipart_upload, **names, **described))
        names["UploadId"] = created["UploadId"]
        condition: Any = {"IfNoneMatch": "*"} if only_new else {}
        written = False
        try:
            parts = await self._send_parts(address, content, names["UploadId"])
            finish = partial(boto3.complete_multipart_upload, **names, MultipartUpload={"Parts": parts}, **condition)
            await self.client.call(address, finish)
            written = True
        except StorageRefused as error:
            # An upload that is gone was finished by an attempt whose answer was lost.
            if not only_new or error.reason not in ("PreconditionFailed", "NoSuchUpload"):
                raise
        finally:
            if not written:
                # The parts of an open upload are stored, and paid for, until someone ends it.
                self.client.submit(partial(self._abort, names))
        return written

    async def _send_parts(
        self, address: ObjectAddress, content: ObjectContent, upload: str
    ) -> "tuple[CompletedPartTypeDef, ...]":
        parts: list[CompletedPartTypeDef] = []
        for number, offset in enumerate(range(0, content.size, self.part_bytes), start=1):
            part = _part(content, offset, self.part_bytes)
            payload = S3Payload(part, await asyncio.to_thread(sha256_of, part))
            query = {"partNumber": str(number), "uploadId": upload}
            answer = await self.client.ask("PUT", address, payload, query=query)
            _require_ok(address, answer)
            parts.append({"PartNumber": number, "ETag": answer.headers["ETag"]})
        return tuple(parts)

    def _abort(self, names: Any) -> None:
        with suppress(BotoCoreError, ClientError):
            self.client.boto3.abort_multipart_upload(**names)

    def _give_up_conditions(self, address: ObjectAddress) -> None:
        """Look before each write from now on: the store has no conditional writes."""
        if self._conditional:
            self._conditional = False
            log.warning(
                "storage has no conditional writes",
                bucket=address.bucket,
                risk="two workers that finish the same task in the same moment both write",
            )


class S3Stream:
    """``ports.ObjectStream`` in S3: when the connection is lost, the next chunk comes from another one."""

    def __init__(self, client: S3Client, address: ObjectAddress, span: ByteRange | None) -> None:
        self._client = client
        self._address = address
        self._next = span.first if span else 0
        self._last = span.last if span else None
        self._etag = ""
        self._response: aiohttp.ClientResponse | None = None
        self.size = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self._client.retry(self._address, self._read):
            yield chunk

    async def connect(self) -> aiohttp.ClientResponse:
        """Ask for all bytes that have not been read. One attempt."""
        headers = {}
        if ranged := self._next > 0 or self._last is not None:
            headers["Range"] = f"bytes={self._next}-{'' if self._last is None else self._last}"
        if self._etag:
            headers["If-Match"] = self._etag  # the rest must be of the same object
        response = await self._client.open_once(self._address, headers)
        if ranged and response.status != _PARTIAL:
            response.close()
            raise refused(self._address, "NoRanges")
        self._etag = response.headers.get("ETag", "")
        whole = response.headers.get("Content-Range", "/0").rpartition("/")[2]
        self.size = int(whole) if ranged else response.content_length or 0
        self._response = response
        return response

    def close(self) -> None:
        """Close the connection, unless all was read."""
        if self._response is not None:
            self._response.close()
            self._response = None

    async def _read(self) -> bytes:
        try:
            response = self._response or await self.connect()
            chunk = await response.content.read(CHUNK_BYTES)
        except NETWORK_ERRORS as error:
            self.close()
            raise network_failure(self._address, error) from error
        self._next += len(chunk)
        self._client.traffic.received_bytes += len(chunk)
        return chunk


def _part(content: ObjectContent, offset: int, size: int) -> bytes | FilePart:
    size = min(size, content.size - offset)
    if isinstance(content.body, bytes):
        return content.body[offset : offset + size]
    return FilePart(content.body, offset, size)


def _names(address: ObjectAddress) -> Any:
    """An object as boto3's calls name it."""
    return {"Bucket": address.bucket, "Key": address.key}


def _metadata(headers: Mapping[str, str]) -> dict[str, str]:
    lower = ((name.lower(), value) for name, value in headers.items())
    return {name.removeprefix(_META): value for name, value in lower if name.startswith(_META)}


def _require_ok(address: ObjectAddress, answer: S3Response) -> None:
    if not answer.ok:
        raise refused(address, answer.code)
