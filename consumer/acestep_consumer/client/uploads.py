# SPDX-License-Identifier: Apache-2.0
"""Uploaded audio: spooled to a file while it arrives, then put into the result bucket, where a request can name it.

A file lies under a name of ours; nothing that a client names becomes a path or a key. Objects are
``<prefix>/uploads/<task_id>/<field><suffix>``: an expiry rule on ``<prefix>/uploads/`` deletes them.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, Protocol

from acestep_consumer.domain.errors import StorageUnavailable
from acestep_consumer.domain.objects import ObjectAddress, ObjectContent, UploadAddresses
from acestep_consumer.domain.ports import Objects

if TYPE_CHECKING:
    from acestep_consumer.config.settings import StorageSettings

SILENCE_S: Final = 60.0
"""Longest time without a byte of an upload."""

UPLOAD_S: Final = 900.0

_STORE_S: Final = 60.0
_DELETE_S: Final = 5.0
_CHUNK_BYTES: Final = 1 << 20
_SUFFIX: Final = re.compile(r"\.[a-z0-9]{1,5}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpooledFile:
    """An uploaded file on disk. ``suffix``: a hint for the decoder."""

    suffix: str
    path: Path
    size: int
    sha256: str


def suffix_of(name: str) -> str:
    """Return the suffix of a file name that somebody sent; empty where it has none that is worth keeping."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if _SUFFIX.fullmatch(suffix) else ""


async def chunks_of(read: Callable[[], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    """Yield what ``read`` returns, until that is empty. Raises ``TimeoutError`` after ``SILENCE_S`` without a byte."""
    while True:
        async with asyncio.timeout(SILENCE_S):
            chunk = await read()
        if not chunk:
            return
        yield chunk


async def spool(
    chunks: AsyncIterator[bytes], path: Path, suffix: str, check_size: Callable[[int, int], None]
) -> SpooledFile:
    """Write an upload to a file.

    Args:
        chunks: its content.
        path: the file, which this makes.
        suffix: as of ``suffix_of``.
        check_size: called after each chunk with the bytes so far and those of the chunk; raises where it is too much.

    Raises:
        OSError: the file cannot be written.
    """
    digest, size, buffer = hashlib.sha256(), 0, bytearray()
    with path.open("wb", buffering=0) as file:

        def append(content: bytes) -> None:
            digest.update(content)
            file.write(content)

        async for chunk in chunks:
            buffer += chunk
            size += len(chunk)
            check_size(size, len(chunk))
            if len(buffer) >= _CHUNK_BYTES:
                await asyncio.to_thread(append, bytes(buffer))
                buffer.clear()
        await asyncio.to_thread(append, bytes(buffer))
    return SpooledFile(suffix=suffix, path=path, size=size, sha256=digest.hexdigest())


class ObjectsSource(Protocol):
    """Connects to the storage at the first call: ``acestep_consumer.client.results.Results``."""

    async def objects(self) -> Objects:
        """Return the storage. Raises ``StorageUnavailable``."""


class UploadStore:
    """Puts spooled files into the result bucket."""

    def __init__(self, results: ObjectsSource, settings: "StorageSettings") -> None:
        self._results = results
        self._addresses = UploadAddresses(settings.bucket, settings.prefix)

    def addresses(self, task_id: str, files: Mapping[str, SpooledFile]) -> dict[str, str]:
        """Return the ``s3://`` address that each file will have, by the field that it replaces."""
        return {name: str(self._addresses.of(task_id, f"{name}{file.suffix}")) for name, file in files.items()}

    async def put(self, task_id: str, files: Mapping[str, SpooledFile]) -> None:
        """Store the files at their addresses, all or none. Raises ``StorageUnavailable``."""
        addresses = self.addresses(task_id, files)
        try:
            async with asyncio.timeout(_STORE_S):
                for name, file in files.items():
                    content = ObjectContent(
                        body=file.path, size=file.size, sha256=file.sha256, content_type="application/octet-stream"
                    )
                    await (await self._results.objects()).put(ObjectAddress.of(addresses[name]), content)
        except TimeoutError as error:
            await self.delete(addresses)
            raise StorageUnavailable("the storage does not answer") from error
        except StorageUnavailable:
            await self.delete(addresses)
            raise

    async def delete(self, stored: Mapping[str, str]) -> None:
        """Delete uploads of a request that was not accepted. What cannot be deleted now is left to the expiry rule."""
        try:
            async with asyncio.timeout(_DELETE_S):
                for address in stored.values():
                    await (await self._results.objects()).delete(ObjectAddress.of(address))
        except (StorageUnavailable, TimeoutError):
            return
