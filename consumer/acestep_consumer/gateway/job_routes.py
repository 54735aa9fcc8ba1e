# SPDX-License-Identifier: Apache-2.0
"""``/v1/jobs/{id}``: a task with its manifest, its progress as server-sent events, and its family."""

import asyncio
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from acestep_consumer.client.errors import DownloadFailed
from acestep_consumer.client.results import Results
from acestep_consumer.gateway.answers import ApiError, dumps, envelope
from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.gateway.result_folder import ResultFolder
from acestep_consumer.gateway.task_items import INPUTS, TaskView, file_url, shown_edits
from acestep_consumer.gateway.tasks import TaskStates
from acestep_schemas.events import Audio, Completed, SongFiles, TerminalEvent

KEEP_ALIVE_S: Final = 15.0
"""Proxies drop idle connections, and a write is how a closed one is noticed."""

MAX_STREAMS: Final = 1_000
_FAMILIES: Final = 4
"""Families that are read at the same time: each takes up to a thousand reads of the storage, one after the other."""
_UNREAD: Final = "the manifest cannot be read: the storage does not answer, or something else lies there"
_EVENT_STREAM: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    # nginx would hold events back.
    "X-Accel-Buffering": "no",
}


class JobRoutes:
    """Routes of single tasks.

    Args:
        keys: checks keys.
        tasks: the states of tasks.
        results: their manifests.
        folder: where these are, which no client reads.
    """

    def __init__(self, keys: ApiKeyCheck, tasks: TaskStates, results: Results, folder: ResultFolder) -> None:
        self._keys = keys
        self._tasks = tasks
        self._results = results
        self._folder = folder
        self._streams = 0
        self._families = asyncio.Semaphore(_FAMILIES)
        self._closing = asyncio.Event()

    async def show(self, request: web.Request) -> web.Response:
        """Tell everything about a task."""
        view = await self._view(request)
        manifest = await self._manifest(view.task_id) if view.ended else None
        return envelope({**_shown(view), "manifest": manifest})

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Send the task's state at each change, until it has ended."""
        view = await self._view(request)
        if self._streams >= MAX_STREAMS:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "too many event streams are open")
        response = web.StreamResponse(headers=_EVENT_STREAM)
        self._streams += 1
        try:
            with suppress(ConnectionError):
                await response.prepare(request)
                await self._send(response, view)
        finally:
            self._streams -= 1
        return response

    async def lineage(self, request: web.Request) -> web.Response:
        """Send the task's family: what its songs come from, and what comes from them."""
        self._keys.by_header(request)
        task_id = request.match_info["task_id"]
        try:
            async with self._families:
                family = await self._results.family(task_id)
        except DownloadFailed as error:
            raise ApiError(HTTPStatus.BAD_GATEWAY, _UNREAD) from error
        if family.tasks[task_id] is None:
            raise ApiError(HTTPStatus.NOT_FOUND, "there is no completed task of this id")
        return envelope(family.listed(task_id, file_url))

    async def close(self, _: web.Application) -> None:
        """End open streams, which would delay the shutdown; browsers open them again by themselves."""
        self._closing.set()
        self._tasks.wake_all()

    async def _send(self, response: web.StreamResponse, view: TaskView) -> None:
        sent: dict[str, Any] | None = None
        while not self._closing.is_set():
            if (shown := _shown(view)) == sent:
                await response.write(b": keep alive\n\n")
            else:
                await response.write(f"event: {view.stage}\ndata: {dumps(shown)}\n\n".encode())
                sent = shown
            if view.ended:
                return
            await self._tasks.wait_for_news((view.task_id,), KEEP_ALIVE_S)
            view = await self._tasks.find(view.task_id) or view

    async def _view(self, request: web.Request) -> TaskView:
        self._keys.by_header(request)
        view = await self._tasks.find(request.match_info["task_id"])
        if view is None:
            raise ApiError(HTTPStatus.NOT_FOUND, "there is no such task")
        return view

    async def _manifest(self, task_id: str) -> dict[str, Any] | None:
        try:
            end = await self._results.find(task_id)
        except DownloadFailed as error:
            raise ApiError(HTTPStatus.BAD_GATEWAY, _UNREAD) from error
        return None if end is None else self._folder.hide(_public(end))


def _shown(view: TaskView) -> dict[str, Any]:
    return {
        "task_id": view.task_id,
        "status": view.status,
        "stage": view.stage,
        "progress": view.progress,
        "progress_text": view.detail,
        "remaining_s": view.remaining_s,
        "create_time": view.created,
        "result": list(view.result()),
    }


def _public(end: TerminalEvent) -> dict[str, Any]:
    """Return the manifest with addresses of this API in place of those in storage."""
    data = end.data
    if not isinstance(data, Completed):
        return data.model_dump(mode="json")
    request = data.request.model_dump(mode="json", exclude_defaults=True, exclude=set(INPUTS))
    shown = data.model_copy(update={"edits": shown_edits(data)}).model_dump(mode="json", exclude={"audios", "request"})
    return {**shown, "request": request, "audios": [_public_audio(data.task_id, audio) for audio in data.audios]}


def _public_audio(task_id: str, audio: Audio) -> dict[str, Any]:
    places = {"uri", "url"}
    shown = {"file": file_url(task_id, audio), **audio.model_dump(mode="json", exclude={*places, "files"})}
    if audio.files is None:
        return {**shown, "files": None}
    files = audio.files.model_dump(mode="json", exclude=dict.fromkeys(SongFiles.model_fields, places))
    # Latents have no address: they are for workers, which find them by the task's id.
    for kind, file in audio.lyric_files.items():
        files[kind] = {"file": file_url(task_id, file), **files[kind]}
    return {**shown, "files": files}
