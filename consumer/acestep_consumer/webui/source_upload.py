# SPDX-License-Identifier: Apache-2.0
"""Uploads of the page's form: audio from the reader's machine, to make a song from."""

import asyncio
import tempfile
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final
from uuid import uuid4

from aiohttp import web

from acestep_consumer.client.uploads import UPLOAD_S, UploadStore, chunks_of, spool, suffix_of
from acestep_consumer.domain.errors import DiskFull, StorageRefused, StorageUnavailable

AT_ONCE: Final = 4
FIELD: Final = "src_audio_path"
"""The field of a request that an upload is for."""

_CHUNK_BYTES: Final = 1 << 18


class UploadRefused(Exception):
    """An upload that is not taken: the HTTP status, and the page's code for it."""

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class SourceUpload:
    """Receives files and puts them into the bucket.

    Args:
        store: puts them there.
        max_bytes: largest file.
        folder: returns where they are while they arrive; None: the system's place for temporary files.
    """

    def __init__(self, store: UploadStore, max_bytes: int, folder: Callable[[], Path | None] = lambda: None) -> None:
        self._store = store
        self.max_bytes = max_bytes
        self._folder = folder
        self._free = AT_ONCE

    async def receive(self, request: web.Request) -> str:
        """Store a request's body, a file whose name is ``?name=``, and return its address. Raises ``UploadRefused``."""
        if not self._free:
            raise UploadRefused(HTTPStatus.SERVICE_UNAVAILABLE, "uploads_busy", "too many uploads at the same time")
        self._free -= 1
        try:
            async with asyncio.timeout(UPLOAD_S):
                return await self._receive(request)
        except TimeoutError:
            text = "the upload did not arrive in time"
            raise UploadRefused(HTTPStatus.REQUEST_TIMEOUT, "upload_slow", text) from None
        except StorageRefused as error:
            raise UploadRefused(HTTPStatus.BAD_GATEWAY, "upload_refused", str(error)) from error
        except StorageUnavailable as error:
            raise UploadRefused(HTTPStatus.BAD_GATEWAY, "upload_away", str(error)) from error
        except (OSError, DiskFull) as error:
            if not DiskFull.caused(error):
                raise
            text = "there is no room for uploads on the page's machine now"
            raise UploadRefused(HTTPStatus.INSUFFICIENT_STORAGE, "no_room", text) from error
        finally:
            self._free += 1

    async def _receive(self, request: web.Request) -> str:
        if (request.content_length or 0) > self.max_bytes:
            raise self._too_large()
        upload_id = uuid4().hex
        with tempfile.TemporaryDirectory(prefix="upload-", dir=self._folder()) as folder:
            chunks = chunks_of(partial(request.content.read, _CHUNK_BYTES))
            suffix = suffix_of(request.query.get("name", ""))
            file = await spool(chunks, Path(folder) / FIELD, suffix, self._check_size)
            if not file.size:
                raise UploadRefused(HTTPStatus.BAD_REQUEST, "upload_empty", "the file is empty")
            await self._store.put(upload_id, {FIELD: file})
            return self._store.addresses(upload_id, {FIELD: file})[FIELD]

    def _check_size(self, size: int, _: int) -> None:
        if size > self.max_bytes:
            raise self._too_large()

    def _too_large(self) -> UploadRefused:
        text = f"the file has more than {self.max_bytes:,} bytes (ACESTEP_INPUT_MAX_BYTES)"
        return UploadRefused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "upload_large", text)
