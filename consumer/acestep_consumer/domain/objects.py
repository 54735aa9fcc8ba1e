# SPDX-License-Identifier: Apache-2.0
"""Objects of an object storage: where one is, what it holds, and what its storage knows about it."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from acestep_schemas.request import is_task_id

MANIFEST: Final = "manifest.json"
"""Name of the object that says how a task ended; it comes last."""

_SCHEME = "s3://"
_UPLOADS = "uploads"
_UPLOAD = re.compile(r"[A-Za-z0-9_-]{1,128}/(?:src|reference)_audio_path(?:\.[a-z0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class ObjectAddress:
    """A bucket, or an object in it."""

    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{_SCHEME}{self.bucket}/{self.key}" if self.key else f"{_SCHEME}{self.bucket}"

    @classmethod
    def of(cls, uri: str) -> Self:
        """Read ``s3://bucket/key``."""
        bucket, _, key = uri.removeprefix(_SCHEME).partition("/")
        return cls(bucket, key)


def join_key(*parts: str) -> str:
    """Return a key of these parts, with one slash between each; empty ones are left out."""
    return "/".join(stripped for part in parts if (stripped := part.strip("/")))


def object_key(prefix: str, task_id: str, name: str) -> str:
    """Return the key of one of a task's objects. Raises ``ValueError`` for an id that could leave its folder."""
    if not is_task_id(task_id):
        raise ValueError(f"not a task id: {task_id[:128]!r}")
    return join_key(prefix, task_id, name)


class UploadAddresses:
    """Addresses of files uploaded over REST: ``<prefix>/uploads/<task_id>/<field><suffix>``, beside the results.

    Args:
        bucket: the result bucket.
        prefix: the prefix of results.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._folder = join_key(prefix, _UPLOADS)

    def of(self, task_id: str, name: str) -> ObjectAddress:
        """Return the address of a task's upload."""
        return ObjectAddress(self._bucket, f"{self._folder}/{task_id}/{name}")

    def has(self, address: ObjectAddress) -> bool:
        """Whether an address is that of an upload, and can be that of no result."""
        start = f"{self._folder}/"
        is_here = address.bucket == self._bucket and address.key.startswith(start)
        return is_here and _UPLOAD.fullmatch(address.key.removeprefix(start)) is not None


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes ``first`` to ``last``, both included, counted from 0."""

    first: int
    last: int

    @property
    def bytes(self) -> int:
        """Number of bytes."""
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectContent:
    """The bytes to write, or the file that holds them, and what is stored with them.

    Attributes:
        body: the bytes, or a file, which is streamed and must not change meanwhile.
        size: bytes of ``body``.
        sha256: hexadecimal; sent along, for the storage to check.
        content_type: as HTTP has it.
        metadata: short texts in ASCII under lower-case names.
    """

    body: bytes | Path
    size: int
    sha256: str
    content_type: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, body: bytes, content_type: str, metadata: Mapping[str, str] | None = None) -> Self:
        """Describe bytes in memory."""
        digest = hashlib.sha256(body).hexdigest()
        return cls(body=body, size=len(body), sha256=digest, content_type=content_type, metadata=metadata or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectHead:
    """Size, ETag and metadata of an object.

    Attributes:
        size: bytes.
        etag: differs between two contents of one object; empty when the storage names none.
        metadata: as it was written.
    """

    size: int
    etag: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SmallObject:
    """An object that was read whole into memory. ``etag`` as in ``ObjectHead``."""

    body: bytes
    metadata: Mapping[str, str]
    etag: str = ""


@dataclass(slots=True)
class Traffic:
    """Bytes of bodies, without headers, and tries after the first. Counted on the event loop, so without locks."""

    sent_bytes: int = 0
    received_bytes: int = 0
    retries: int = 0
