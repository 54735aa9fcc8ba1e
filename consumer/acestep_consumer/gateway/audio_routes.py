# SPDX-License-Identifier: Apache-2.0
"""``/v1/audio``: songs from storage, streamed, and their lyrics with times.

Never a redirect: some clients do not follow one, and save nothing.
"""

from http import HTTPStatus
from typing import Final

from aiohttp import web

from acestep_consumer.gateway.answers import ApiError
from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.gateway.messages import song_name
from acestep_consumer.gateway.tasks import TaskStates
from acestep_consumer.webui.audio_proxy import AudioProxy, SongUnavailable
from acestep_schemas.events import Audio, FileObject

# The proxy's own texts name buckets and keys, which clients of this API need not know.
_TEXTS: Final = {
    HTTPStatus.FORBIDDEN: "access to this file is not allowed",
    HTTPStatus.NOT_FOUND: "Audio file not found",
}


class SongFinder:
    """Finds songs by the name that ``/query_result`` gave them: only those in a task's manifest exist."""

    def __init__(self, tasks: TaskStates) -> None:
        self._tasks = tasks

    async def audio(self, task_id: str, name: str) -> Audio | None:
        """Return a task's song; None: there is none of this name."""
        return next((audio for audio in await self._audios(task_id) if _name_of(audio) == name), None)

    async def file(self, task_id: str, name: str) -> Audio | FileObject | None:
        """Return a task's song, or a song's lyrics with times; None: there is no such file."""
        songs = await self._audios(task_id)
        files: list[Audio | FileObject] = [*songs, *(file for song in songs for file in song.lyric_files.values())]
        return next((file for file in files if _name_of(file) == name), None)

    async def address(self, task_id: str, name: str) -> str | None:
        """Return where the song is in storage; None: there is none."""
        audio = await self.audio(task_id, name)
        return None if audio is None else audio.uri

    def known(self, task_id: str) -> tuple[Audio, ...] | None:
        """Return the songs of a task that is in memory."""
        view = self._tasks.known(task_id)
        return view.audios if view is not None and view.ended else None

    async def _audios(self, task_id: str) -> tuple[Audio, ...]:
        view = await self._tasks.find(task_id)
        return view.audios if view is not None else ()


class AudioRoutes:
    """The route of songs. ``keys`` checks keys, ``finder`` finds songs, ``proxy`` sends them."""

    def __init__(self, keys: ApiKeyCheck, finder: SongFinder, proxy: AudioProxy) -> None:
        self._keys = keys
        self._finder = finder
        self._proxy = proxy

    async def audio(self, request: web.Request) -> web.StreamResponse:
        """Send a song or its lyrics with times, or the requested range of it."""
        self._authorize(request)
        path = request.query.get("path")
        if path is None:
            raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "the query parameter path is missing")
        song = song_name(path)
        if song is None:
            raise ApiError(HTTPStatus.FORBIDDEN, _TEXTS[HTTPStatus.FORBIDDEN])
        try:
            return await self._send(request, *song)
        except SongUnavailable as error:
            raise ApiError(error.status, _TEXTS.get(error.status, "the storage does not answer")) from error

    async def _send(self, request: web.Request, task_id: str, name: str) -> web.StreamResponse:
        """Send a file of a task. Raises ``ApiError``, ``SongUnavailable``."""
        if (file := await self._finder.file(task_id, name)) is None:
            raise ApiError(HTTPStatus.NOT_FOUND, _TEXTS[HTTPStatus.NOT_FOUND])
        self._proxy.check(task_id, file)
        return await self._proxy.send(request, file, None)

    def _authorize(self, request: web.Request) -> None:
        """Check the header, or the query's ``ai_token``: ``<audio src>`` sends no header. Raises ``ApiError``."""
        token = request.query.get("ai_token")
        if token is not None and "Authorization" not in request.headers:
            self._keys.by_body(request, {"ai_token": token})
        else:
            self._keys.by_header(request)


def _name_of(file: Audio | FileObject) -> str:
    return file.uri.rpartition("/")[2]
