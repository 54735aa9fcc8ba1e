# SPDX-License-Identifier: Apache-2.0
"""Proxies songs and lyrics from storage to browsers: only objects that a terminal event names, whole or a range."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

from aiohttp import web

from acestep_consumer.client import DownloadFailed
from acestep_consumer.client.results import Results
from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import StorageRefused, StorageUnavailable
from acestep_consumer.domain.objects import ByteRange, join_key
from acestep_consumer.domain.ports import ObjectStream
from acestep_consumer.webui.job_view import content_type_of
from acestep_schemas.events import Audio, FileObject, JobCompleted

STALL_S: Final = 30.0
"""Longest time that a player may take nothing: each one holds one of the few connections to storage."""

StoredFile = Audio | FileObject
KnownSongs = Callable[[str], Sequence[Audio] | None]


class SongUnavailable(Exception):
    """The song does not exist, or cannot be fetched now. ``status`` is the HTTP status; the text is for a person."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class AudioProxy:
    """The songs in the result bucket.

    Args:
        settings: where results are stored.
        results: reads how a job ended, for jobs that are not in memory.
        known: returns the songs of a job that is in memory; None: it is not.
    """

    def __init__(self, settings: StorageSettings, results: Results, known: KnownSongs) -> None:
        self._settings = settings
        self._results = results
        self._known = known

    async def find(self, task_id: str, index: int) -> Audio:
        """Return the song of that number, from 0. Raises ``SongUnavailable``."""
        known = self._known(task_id)
        audios = await self._stored(task_id) if known is None else known
        if index >= len(audios):
            raise SongUnavailable(HTTPStatus.NOT_FOUND, f"{task_id} has no song number {index + 1}")
        self.check(task_id, audios[index])
        return audios[index]

    async def find_lyrics(self, task_id: str, index: int, kind: str) -> FileObject:
        """Return the lyrics of a song with times, ``lrc`` or ``vtt``. Raises ``SongUnavailable``."""
        file = (await self.find(task_id, index)).lyric_files.get(kind)
        if file is None:
            raise SongUnavailable(HTTPStatus.NOT_FOUND, f"song {index + 1} of {task_id} has no lyrics with times")
        self.check(task_id, file)
        return file

    def check(self, task_id: str, file: StoredFile) -> None:
        """Raise ``SongUnavailable`` unless the file is in its job's folder."""
        if not self._is_in_folder(task_id, file.uri):
            raise SongUnavailable(HTTPStatus.FORBIDDEN, f"{file.uri} is outside of this job's folder")

    async def send(self, request: web.Request, file: StoredFile, name: str | None) -> web.StreamResponse:
        """Answer with the file or the requested range of it. ``name``: the file name to save it under.

        Raises:
            SongUnavailable: it cannot be fetched from storage.
        """
        tag = f'"{file.sha256}"'
        headers = _headers(file, tag, name)
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=headers)
        try:
            span = _span(request, file.bytes, tag)
        except ValueError:
            return web.Response(
                status=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                headers=headers | {"Content-Range": f"bytes */{file.bytes}"},
            )
        response = _response(file, span, headers)
        if request.method == "HEAD":
            return response
        async with self.opened(file, span) as stream:
            try:
                await response.prepare(request)
                async for chunk in stream:
                    async with asyncio.timeout(STALL_S):
                        await response.write(chunk)
            except (StorageUnavailable, ConnectionError, TimeoutError):
                # The player closed the connection or has paused, which they do all the time, or storage closed its own:
                # then an aborted connection makes the browser request the rest.
                if request.transport is not None:
                    request.transport.abort()
        return response

    @asynccontextmanager
    async def opened(self, file: StoredFile, span: ByteRange | None = None) -> AsyncIterator[ObjectStream]:
        """Open a file, or ``span`` of it, for reading.

        Raises:
            SongUnavailable: it cannot be fetched from storage.
            StorageUnavailable: storage failed in the middle of it.
        """
        try:
            async with self._results.open(file.uri, span) as stream:
                if stream.size != file.bytes:
                    raise SongUnavailable(HTTPStatus.BAD_GATEWAY, _changed(file))
                yield stream
        except StorageRefused as error:
            raise _refused(file, error) from error
        except StorageUnavailable as error:
            raise SongUnavailable(HTTPStatus.BAD_GATEWAY, f"storage does not answer: {error}") from error

    async def _stored(self, task_id: str) -> tuple[Audio, ...]:
        try:
            end = await self._results.find(task_id)
        except DownloadFailed as error:
            raise SongUnavailable(HTTPStatus.BAD_GATEWAY, str(error)) from error
        return end.data.audios if isinstance(end, JobCompleted) else ()

    def _is_in_folder(self, task_id: str, uri: str) -> bool:
        """Whether an object is in the job's own folder: whoever may publish events could name any object."""
        folder = join_key(self._settings.bucket, self._settings.prefix, task_id)
        return uri.startswith(f"s3://{folder}/") and ".." not in uri


def _headers(file: StoredFile, tag: str, name: str | None) -> dict[str, str]:
    headers = {
        "Accept-Ranges": "bytes",
        # Songs are written once. The browser's cache answers the second request, for the waveform.
        "Cache-Control": "private, max-age=86400, immutable",
        "Content-Type": content_type_of(file),
        "ETag": tag,
    }
    return headers | ({"Content-Disposition": f'attachment; filename="{name}"'} if name else {})


def _span(request: web.Request, size: int, tag: str) -> ByteRange | None:
    """Return the requested range; None: the whole song. Raises ``ValueError`` when there are no such bytes."""
    if request.headers.get("If-Range", tag) != tag:
        return None
    asked = request.headers.get("Range", "")
    if not asked or "," in asked:  # several ranges may be answered with the whole
        return None
    part = request.http_range
    first, stop, _ = part.indices(size)
    if first >= stop:
        raise ValueError(asked)
    return ByteRange(first, stop - 1)


def _response(file: StoredFile, span: ByteRange | None, headers: dict[str, str]) -> web.StreamResponse:
    status = HTTPStatus.PARTIAL_CONTENT if span else HTTPStatus.OK
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = span.bytes if span else file.bytes
    if span:
        response.headers["Content-Range"] = f"bytes {span.first}-{span.last}/{file.bytes}"
    return response


def _refused(file: StoredFile, error: StorageRefused) -> SongUnavailable:
    if error.missing:
        return SongUnavailable(HTTPStatus.NOT_FOUND, f"{file.uri} was deleted")
    if error.reason == "InvalidRange":
        return SongUnavailable(HTTPStatus.BAD_GATEWAY, _changed(file))
    return SongUnavailable(HTTPStatus.BAD_GATEWAY, f"storage refuses {error}")


def _changed(file: StoredFile) -> str:
    return f"{file.uri} does not have the size in its event: it was changed"
