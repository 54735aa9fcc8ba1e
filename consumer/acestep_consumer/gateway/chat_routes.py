# SPDX-License-Identifier: Apache-2.0
"""``/v1/chat/completions``: a song as the answer of a chat, whole or streamed."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any, Final
from uuid import uuid4

from aiohttp import web

from acestep_consumer.client.results import Results
from acestep_consumer.domain.errors import StorageUnavailable
from acestep_consumer.gateway.answers import ApiError, busy, dumps
from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.gateway.bodies import MULTIPART, fields_of, read_body
from acestep_consumer.gateway.chat_request import ChatRequest, read_chat
from acestep_consumer.gateway.submission import AWAITED_PRIORITY, Submission, TaskOrder
from acestep_consumer.gateway.task_items import TaskView
from acestep_consumer.gateway.uploads import UploadSpool
from acestep_consumer.webui.audio_proxy import STALL_S
from acestep_consumer.webui.job_view import content_type_of
from acestep_schemas.events import Audio, Metas

BODY_BYTES: Final = 32 << 20
"""Largest body; audio in it is base64, which takes a third more."""

AT_ONCE: Final = 32
DOT_S: Final = 2.0
_RETRY_S: Final = 10.0
_THREAD_BYTES: Final = 1 << 20
_DATA: Final = f"song-{uuid4().hex}"
"""Stands for the song until it is written."""


class ChatRoutes:
    """The route of chats.

    Args:
        keys: checks keys.
        submission: publishes tasks and waits for them.
        spool: keeps audio inputs while they are uploaded.
        results: reads songs.
        timeout_s: longest wait for a song.
    """

    def __init__(
        self, keys: ApiKeyCheck, submission: Submission, spool: UploadSpool, results: Results, *, timeout_s: float
    ) -> None:
        self._keys = keys
        self._submission = submission
        self._spool = spool
        self._results = results
        self._timeout_s = timeout_s
        self._free = AT_ONCE

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Make a song and answer with it."""
        owner = self._keys.by_header(request)  # before the body, which may be large
        async with self._slot():
            chat = await _read(request)
            async with self._spool.keep(chat.audios) as files:
                order = TaskOrder.of(request, owner, chat.fields, files=files, priority=AWAITED_PRIORITY)
                view = await self._submission.submit(order)
            if chat.stream:
                return await self._stream(request, chat, view)
            view = await self._submission.wait(view, self._timeout_s)
            _require_success(view)
            return await self._send(request, chat, view)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        if not self._free:
            raise busy(HTTPStatus.SERVICE_UNAVAILABLE, "too many chats at the same time", _RETRY_S)
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1

    async def _send(self, request: web.Request, chat: ChatRequest, view: TaskView) -> web.StreamResponse:
        """Send the answer in one piece of JSON, written as the song is read."""
        message = {"role": "assistant", "content": content_of(view.metas), "audio": _parts(view), "audio_codes": None}
        body = {
            "id": f"chatcmpl-{uuid4().hex[:16]}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": chat.model,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
        pieces = self._filled(dumps(body), view)
        first = await anext(pieces)  # before the status: the storage may be out of reach
        response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
        await response.prepare(request)
        await response.write(first)
        try:
            async for piece in pieces:
                await _write(response, piece)
        except (ApiError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()  # half a song must not look like an answer
        return response

    async def _stream(self, request: web.Request, chat: ChatRequest, view: TaskView) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
        )
        await response.prepare(request)
        chunks = _ChunkWriter(response, chat.model)
        try:
            await chunks.write({"role": "assistant", "content": ""})
            view = await self._wait_with_dots(chunks, view)
            _require_success(view)
            await chunks.write({"content": f"\n\n{content_of(view.metas)}"})
            if view.audios:
                async for piece in self._filled(chunks.line({"audio": _parts(view)}), view):
                    await _write(response, piece)
            await chunks.end("stop")
        except ApiError as error:
            await chunks.write({"content": f"\n\nError: {error}"})
            await chunks.end("error")
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _wait_with_dots(self, chunks: "_ChunkWriter", view: TaskView) -> TaskView:
        """Wait for the end, and write a dot every two seconds. Raises ``ApiError``, ``ConnectionError``."""
        waiting = asyncio.ensure_future(self._submission.wait(view, self._timeout_s))
        try:
            while not (await asyncio.wait({waiting}, timeout=DOT_S))[0]:
                await chunks.write({"content": "."})
            return waiting.result()
        finally:
            # The client is gone: so is the task, which `wait` cancels.
            waiting.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await waiting

    async def _filled(self, text: str, view: TaskView) -> AsyncIterator[bytes]:
        """Yield a text with the first song as base64 in its place. Raises ``ApiError`` (502)."""
        before, mark, after = text.partition(_DATA)
        if not mark:
            yield before.encode()
            return
        try:
            async with self._results.open(view.audios[0].uri) as song:
                yield before.encode()
                rest = b""
                async for chunk in song:
                    whole = len(rest + chunk) // 3 * 3
                    yield base64.b64encode((rest + chunk)[:whole])
                    rest = (rest + chunk)[whole:]
                yield base64.b64encode(rest) + after.encode()
        except StorageUnavailable as error:
            raise ApiError(HTTPStatus.BAD_GATEWAY, "the song cannot be read from the storage") from error


async def _read(request: web.Request) -> ChatRequest:
    media = request.headers.get("Content-Type", "")
    if media.lower().startswith(MULTIPART):
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
    body = await read_body(request, BODY_BYTES)
    if len(body) < _THREAD_BYTES:
        return read_chat(fields_of(body, media))
    return await asyncio.to_thread(lambda: read_chat(fields_of(body, media)))


async def _write(response: web.StreamResponse, piece: bytes) -> None:
    """Write a piece of a song. Raises ``TimeoutError`` where the client takes nothing."""
    async with asyncio.timeout(STALL_S):
        await response.write(piece)


class _ChunkWriter:
    """Writes the chunks of a streamed answer."""

    def __init__(self, response: web.StreamResponse, model: str) -> None:
        self._response = response
        self._shared = {
            "id": f"chatcmpl-{uuid4().hex[:16]}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def line(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return f"data: {dumps({**self._shared, 'choices': [choice]})}\n\n"

    async def write(self, delta: Mapping[str, Any]) -> None:
        await self._response.write(self.line(delta).encode())

    async def end(self, finish_reason: str) -> None:
        await self._response.write(f"{self.line({}, finish_reason)}data: [DONE]\n\n".encode())


def content_of(metas: Metas | None) -> str:
    """Return the text of an answer: the metadata that are known, and the lyrics."""
    if metas is None:
        return "Music generated successfully."
    known = (
        ("Caption", metas.caption),
        ("BPM", metas.bpm),
        ("Duration", f"{metas.duration:g}s" if metas.duration else None),
        ("Key", metas.keyscale),
        ("Time Signature", metas.timesignature),
    )
    lines = [f"**{name}:** {value}" for name, value in known if value]
    parts = ["\n".join(("## Metadata", *lines))] if lines else []
    parts += [f"## Lyrics\n{metas.lyrics}"] if metas.lyrics else []
    return "\n\n".join(parts) or "Music generated successfully."


def _require_success(view: TaskView) -> None:
    if view.stage == "failed":
        raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, view.detail)


def _parts(view: TaskView) -> list[dict[str, Any]] | None:
    if not view.audios:
        return None
    return [{"type": "audio_url", "audio_url": {"url": f"data:{_media_type(view.audios[0])};base64,{_DATA}"}}]


def _media_type(audio: Audio) -> str:
    return content_type_of(audio).partition(";")[0]
