# SPDX-License-Identifier: Apache-2.0
"""Multipart forms: their files are spooled while they arrive, and stored once the request is let in."""

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final

import structlog
from aiohttp import BodyPartReader, web

from acestep_consumer.client.uploads import UPLOAD_S, SpooledFile, chunks_of, spool, suffix_of
from acestep_consumer.domain.errors import DiskFull
from acestep_consumer.domain.parse import gathered
from acestep_consumer.gateway.answers import ApiError, busy
from acestep_consumer.gateway.auth import TOKEN

FILE_FIELDS: Final[Mapping[str, str]] = {
    "ref_audio": "reference_audio_path",
    "reference_audio": "reference_audio_path",
    "ctx_audio": "src_audio_path",
    "src_audio": "src_audio_path",
}
"""Name of an uploaded file -> the field that it replaces; of two files for one field the first name here counts."""

MAX_PARTS: Final = 1_000
MAX_TEXT_BYTES: Final = 1 << 20
MAX_STRANGER_BYTES: Final = 32 << 20
"""Bytes of files that are spooled before a key was seen: ``ai_token`` may come after them."""

AT_ONCE: Final = 16
STRANGERS_AT_ONCE: Final = 4
"""Of these, uploads of requests that have shown no key yet: they must not keep others out."""

_RETRY_S: Final = 5.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SpooledForm:
    """A multipart form: its text fields, and its files by the field that each replaces."""

    fields: dict[str, object]
    files: dict[str, SpooledFile] = field(default_factory=dict)


class UploadSpool:
    """Receives multipart forms.

    Args:
        max_bytes: largest file.
        folder: returns where temporary files are; None: the system's place for them.
    """

    def __init__(self, max_bytes: int, folder: Callable[[], Path | None]) -> None:
        self._max_bytes = max_bytes
        self._folder = folder
        self._free, self._free_for_strangers = AT_ONCE, STRANGERS_AT_ONCE

    @asynccontextmanager
    async def receive(self, request: web.Request, is_key: Callable[[str], bool] | None) -> AsyncIterator[SpooledForm]:
        """Read a form; its files exist within the block.

        Args:
            request: its body.
            is_key: judges an ``ai_token``, where the request has shown no key yet; None: it has.

        Raises:
            ApiError: 400, 408, 413, or 503 where too many uploads are going on.
        """
        stranger = is_key is not None
        if not self._free or (stranger and not self._free_for_strangers):
            raise busy(HTTPStatus.SERVICE_UNAVAILABLE, "too many uploads at the same time", _RETRY_S)
        self._free -= 1
        self._free_for_strangers -= stranger
        try:
            async with self._temporary_folder() as folder:
                reader = _FormReader(folder, self._max_bytes, is_key)
                with _on_disk():
                    form = await reader.read(request)
                yield form
        finally:
            self._free += 1
            self._free_for_strangers += stranger

    @asynccontextmanager
    async def keep(self, audios: Mapping[str, tuple[bytes, str]]) -> AsyncIterator[dict[str, SpooledFile]]:
        """Write audio in memory to files, which exist within the block, by the field that each is for.

        Raises ``ApiError`` (413).
        """
        if any(len(content) > self._max_bytes for content, _ in audios.values()):
            raise _too_large(self._max_bytes)
        async with self._temporary_folder() as folder:
            files = {}
            for name, (content, suffix) in audios.items():
                path = folder / name
                with _on_disk():
                    await asyncio.to_thread(path.write_bytes, content)
                digest = hashlib.sha256(content).hexdigest()
                files[name] = SpooledFile(suffix=suffix, path=path, size=len(content), sha256=digest)
            yield files

    @asynccontextmanager
    async def _temporary_folder(self) -> AsyncIterator[Path]:
        with _on_disk():
            folder = tempfile.TemporaryDirectory(prefix="upload-", dir=self._folder())
        with folder as name:
            yield Path(name)


@contextmanager
def _on_disk() -> Iterator[None]:
    """Raise ``ApiError`` (503) where the disk is full."""
    try:
        yield
    except (OSError, DiskFull) as error:
        if DiskFull.caused(error):
            log.warning("upload refused", reason="the disk is full: see ACESTEP_SCRATCH_DIR")
            text = "there is no room for uploads on this server now"
            raise busy(HTTPStatus.SERVICE_UNAVAILABLE, text, _RETRY_S) from error
        raise


class _FormReader:
    def __init__(self, folder: Path, max_bytes: int, is_key: Callable[[str], bool] | None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._is_key = is_key
        self._texts: list[tuple[str, str]] = []
        self._files: dict[str, SpooledFile] = {}
        self._received = 0

    async def read(self, request: web.Request) -> SpooledForm:
        try:
            async with asyncio.timeout(UPLOAD_S):
                await self._read_parts(request)
        except TimeoutError:
            raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "the upload did not arrive in time") from None
        fields = {name: value for name, value in gathered(self._texts).fields.items() if name not in FILE_FIELDS}
        chosen: dict[str, SpooledFile] = {}
        for name, target in FILE_FIELDS.items():
            if name in self._files:
                chosen.setdefault(target, self._files[name])
        return SpooledForm(fields, chosen)

    async def _read_parts(self, request: web.Request) -> None:
        try:
            parts = await request.multipart()
            count = 0
            while (part := await parts.next()) is not None:
                count += 1
                if count > MAX_PARTS:
                    raise ApiError(HTTPStatus.BAD_REQUEST, f"Too many fields. Maximum number is {MAX_PARTS:,}.")
                if not isinstance(part, BodyPartReader):
                    raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid multipart data.")
                await self._read_part(part)
        except (ValueError, AssertionError, RuntimeError) as error:  # a broken form, by the name of each check
            missing = "boundary=" not in request.headers.get("Content-Type", "").lower()
            text = "Missing boundary in multipart." if missing else "Invalid multipart data."
            raise ApiError(HTTPStatus.BAD_REQUEST, text) from error

    async def _read_part(self, part: BodyPartReader) -> None:
        name = part.name or ""
        if part.filename:
            found = await self._spool(part)
            self._files.setdefault(name, found)
            return
        text = bytearray()
        async for chunk in chunks_of(part.read_chunk):
            text += chunk
            if len(text) > MAX_TEXT_BYTES:
                raise ApiError(HTTPStatus.BAD_REQUEST, f"Field exceeded maximum size of {MAX_TEXT_BYTES // 1024}KB.")
        if part.filename is None:  # an empty one is that of a file input without a file
            self._texts.append((name, bytes(text).decode("utf-8", "replace")))
        if name == TOKEN and self._is_key is not None and self._is_key(self._texts[-1][1]):
            self._is_key = None

    async def _spool(self, part: BodyPartReader) -> SpooledFile:
        path = self._folder / str(len(self._files))
        return await spool(chunks_of(part.read_chunk), path, suffix_of(part.filename or ""), self._check_size)

    def _check_size(self, size: int, more: int) -> None:
        self._received += more
        if size > self._max_bytes or self._received > 2 * self._max_bytes:
            raise _too_large(self._max_bytes)
        if self._is_key is not None and self._received > MAX_STRANGER_BYTES:
            text = f"send the key as a header, or ai_token before files of more than {MAX_STRANGER_BYTES:,} bytes"
            raise ApiError(HTTPStatus.UNAUTHORIZED, text)


def _too_large(max_bytes: int) -> ApiError:
    text = f"the file has more than {max_bytes:,} bytes (ACESTEP_INPUT_MAX_BYTES)"
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
