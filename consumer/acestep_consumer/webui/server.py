# SPDX-License-Identifier: Apache-2.0
"""The page's server: the page itself, updates as server-sent events, songs, submitting and cancelling."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http import HTTPStatus
from importlib.resources import files
from types import MappingProxyType
from typing import Final, Protocol
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Handler

from acestep_consumer.client import ClientError, DownloadFailed, QueueFull, Unreachable
from acestep_consumer.client.results import Results
from acestep_consumer.domain import edits
from acestep_consumer.domain.errors import InvalidRequest
from acestep_consumer.domain.tasks import TASKS
from acestep_consumer.policy.tiers import beyond_every_tier
from acestep_consumer.webui.archive import CONTENT_TYPE, ArchivedSong, ArchiveIncomplete, archive
from acestep_consumer.webui.audio_proxy import STALL_S, AudioProxy, SongUnavailable
from acestep_consumer.webui.job_board import JobBoard, UpdateFeed
from acestep_consumer.webui.job_request import JobRequest
from acestep_consumer.webui.job_view import file_name
from acestep_consumer.webui.origin_check import OriginCheck, add_headers
from acestep_consumer.webui.source_upload import SourceUpload, UploadRefused
from acestep_schemas.coerce import LANGUAGES
from acestep_schemas.events import JobCompleted
from acestep_schemas.request import (
    EMBEDDED_AUDIO,
    TASK_ID_PATTERN,
    FieldProblem,
    GenerationRequest,
    RequestInvalid,
    parse_request,
)
from acestep_schemas.strict_json import loads

_PAGE: Final = files("acestep_consumer.webui") / "page"
_TYPES: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FILES: Final = MappingProxyType(
    {
        f"/{'' if file.name == 'index.html' else file.name}": (file.name, _TYPES[file.name.rpartition(".")[2]])
        for file in _PAGE.iterdir()
    }
)
MAX_PAGES: Final = 64
MAX_REQUEST_BYTES: Final = 256 << 10
# Proxies and phones drop an idle connection; and a write is how a closed page is noticed.
KEEP_ALIVE_S: Final = 15.0
# Each job reports progress twice a second; a page is updated less often than all of them together.
BETWEEN_UPDATES_S: Final = 0.2
RECONNECT_MS: Final = 1000

_TASK_ID: Final = "{task_id:" + TASK_ID_PATTERN.strip("^$") + "}"


class JobClient(Protocol):
    """Publishes requests: ``acestep_consumer.client.Client``, as far as the page uses it."""

    async def submit(self, request: Mapping[str, object]) -> object:
        """Publish a request. Raises ``ClientError``."""

    async def cancel(self, task_id: str) -> None:
        """Ask for a job to stop. Raises ``ClientError``."""

    async def waiting(self) -> int | None:
        """Return how many requests wait; None: not known. Raises ``ClientError``."""


class PageServer:
    """The page's routes.

    Args:
        client: publishes requests and cancellations.
        board: the latest jobs.
        songs: audio from S3.
        results: reads how a job ended, for jobs that are opened by id.
        upload: stores audio that the form sends.
    """

    def __init__(
        self, client: JobClient, board: JobBoard, songs: AudioProxy, results: Results, upload: SourceUpload
    ) -> None:
        self._client = client
        self._board = board
        self._songs = songs
        self._results = results
        self._source_upload = upload
        self._closing = asyncio.Event()

    def application(self, origin_check: OriginCheck) -> web.Application:
        """Return the application; requests that ``origin_check`` refuses reach no route."""
        app = web.Application(middlewares=[origin_check.middleware, _end_abandoned], client_max_size=MAX_REQUEST_BYTES)
        app.on_response_prepare.append(add_headers)
        app.on_shutdown.append(self.close)
        for method, path, handler in self.routes():
            add = app.router.add_get if method == "GET" else app.router.add_post
            add(path, handler)
        return app

    def routes(self) -> Iterator[tuple[str, str, Handler]]:
        """Yield method, path and handler of each route, for a server that has others as well."""
        for path, (name, kind) in FILES.items():
            yield "GET", path, _page_file(name, kind)
        yield "GET", "/events", self._events
        yield "GET", "/options", self._options
        yield "GET", "/songs.zip", self._archive
        yield "GET", f"/audio/{_TASK_ID}/{{index:[0-9]{{1,3}}}}", self._audio
        yield "GET", f"/audio/{_TASK_ID}/{{index:[0-9]{{1,3}}}}/{{kind:lrc|vtt}}", self._lyrics
        yield "GET", f"/jobs/{_TASK_ID}/request", self._request
        yield "POST", "/jobs", self._submit
        yield "POST", "/uploads", self._upload
        yield "POST", f"/jobs/{_TASK_ID}/cancel", self._cancel
        yield "POST", f"/jobs/{_TASK_ID}/show", self._show

    async def close(self, _: web.Application) -> None:
        """End the pages' connections, which would delay the shutdown; they reconnect by themselves."""
        self._closing.set()
        self._board.wake()

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._board.viewers >= MAX_PAGES:
            return _problem(HTTPStatus.SERVICE_UNAVAILABLE, "too_many", f"{MAX_PAGES} pages are open already")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        # A browser that reconnects by itself sends the header; a page that was hidden for a while sends the query.
        cursor = request.headers.get("Last-Event-ID") or request.query.get("since", "")
        with self._board.feed(cursor) as feed, suppress(ConnectionError):
            await response.prepare(request)
            await self._send_updates(feed, response)  # until the page is closed
        return response

    async def _send_updates(self, feed: UpdateFeed, response: web.StreamResponse) -> None:
        await response.write(f"retry: {RECONNECT_MS}\n\n".encode())
        while not self._closing.is_set():
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    await feed.available.wait()
            except TimeoutError:
                await response.write(b": keep alive\n\n")
                continue
            update = self._board.take(feed)
            await response.write(f"id: {self._board.cursor}\ndata: {update.model_dump_json()}\n\n".encode())
            await asyncio.sleep(BETWEEN_UPDATES_S)

    async def _audio(self, request: web.Request) -> web.StreamResponse:
        task_id, index = request.match_info["task_id"], int(request.match_info["index"])
        try:
            audio = await self._songs.find(task_id, index)
            name = file_name(task_id, audio) if "download" in request.query else None
            return await self._songs.send(request, audio, name)
        except SongUnavailable as error:
            return web.Response(status=error.status, text=f"{error}\n")

    async def _lyrics(self, request: web.Request) -> web.StreamResponse:
        task_id, index = request.match_info["task_id"], int(request.match_info["index"])
        try:
            file = await self._songs.find_lyrics(task_id, index, request.match_info["kind"])
            return await self._songs.send(request, file, file_name(task_id, file))
        except SongUnavailable as error:
            return web.Response(status=error.status, text=f"{error}\n")

    async def _options(self, _: web.Request) -> web.Response:
        """Tell which fields requests of this version have and how large a file may be, for the form."""
        largest = self._source_upload.max_bytes
        return web.json_response({"fields": sorted(FIELDS), "languages": list(LANGUAGES), "upload_bytes": largest})

    async def _request(self, request: web.Request) -> web.Response:
        """Send the whole request of a job, or with ``?another`` the one that makes another song like it."""
        task_id = request.match_info["task_id"]
        try:
            found = await self._request_of(task_id)
            if found is None:
                return _unknown(task_id)
            source = await self._request_of(found.request.source_task_id)
            named = source.request if source is not None else None
            if "another" in request.query:
                return web.json_response({"request": found.another(named, await self._request_of(found.draft))})
            return web.json_response({"request": found.whole(named)})
        except DownloadFailed as error:
            return _problem(HTTPStatus.BAD_GATEWAY, "storage", str(error))

    async def _request_of(self, task_id: str | None) -> JobRequest | None:
        """Return the request of a job on the page, or of one in storage that has songs. Raises ``DownloadFailed``."""
        if task_id is None:
            return None
        if (found := self._board.request_of(task_id)) is not None:
            return found
        end = await self._results.find(task_id)
        if not isinstance(end, JobCompleted):
            return None
        return JobRequest(end.data.request, end.data.parents, end.data.edits)

    async def _archive(self, request: web.Request) -> web.StreamResponse:
        """Send the songs of the jobs ``?board=EPOCH&jobs=1.2.3``, by their numbers, as one ZIP file."""
        numbers = request.query.get("jobs", "").split(".")
        if not all(number.isascii() and number.isdecimal() and len(number) < _DIGITS for number in numbers):
            return web.Response(status=HTTPStatus.BAD_REQUEST, text="jobs must be numbers\n")
        found = self._board.archived(request.query.get("board", ""), [int(number) for number in numbers])
        if not found:
            return web.Response(status=HTTPStatus.NOT_FOUND, text="none of these songs is on the page any more\n")
        headers = {"Content-Type": CONTENT_TYPE, "Content-Disposition": 'attachment; filename="songs.zip"'}
        response = web.StreamResponse(headers=headers)
        try:
            await response.prepare(request)
            async for chunk in archive(self._songs, [ArchivedSong(*song) for song in found]):
                async with asyncio.timeout(STALL_S):
                    await response.write(chunk)
        except (ArchiveIncomplete, ConnectionError, TimeoutError):
            # Half of an archive must not look like a whole one.
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _place(self) -> int | None:
        """Return how many requests wait just after one was accepted: its place."""
        try:
            return await self._client.waiting()
        except ClientError:
            return None

    async def _submit(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            return _problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not_json", "send application/json")
        try:
            # Bounded in depth, as a worker reads it: a deeply nested body would exhaust Python's stack.
            body, wanted = read_form(loads((await _body(request)).decode("utf-8-sig")).value)
        except (RequestInvalid, InvalidRequest) as error:
            fields = [{"field": problem.field, "rule": problem.rule} for problem in error.problems]
            return _problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", str(error), fields=fields)
        except ValueError as error:
            return _problem(HTTPStatus.BAD_REQUEST, "not_json", str(error))
        task_id = str(body["task_id"])
        # Before it is published, because its first event may arrive before the broker's confirm.
        self._board.add_request(task_id, wanted)
        try:
            await self._client.submit(body)
        except ClientError as error:
            (self._board.mark_unsure if isinstance(error, Unreachable) else self._board.remove_request)(task_id)
            return _client_error(error)
        self._board.mark_sent(task_id, await self._place())
        return web.json_response({"task_id": task_id}, status=HTTPStatus.ACCEPTED)

    async def _upload(self, request: web.Request) -> web.Response:
        """Store the body, a file, and send the address for a request's ``src_audio_path``."""
        try:
            return web.json_response({"address": await self._source_upload.receive(request)}, status=HTTPStatus.CREATED)
        except UploadRefused as error:
            return _problem(error.status, error.code, str(error))

    async def _cancel(self, request: web.Request) -> web.Response:
        task_id = request.match_info["task_id"]
        if self._board.get(task_id) is None:
            return _problem(HTTPStatus.NOT_FOUND, "unknown_job", f"{task_id} is unknown to this page")
        try:
            await self._client.cancel(task_id)
        except ClientError as error:
            return _client_error(error)
        self._board.mark_stopping(task_id)
        return web.json_response({"task_id": task_id}, status=HTTPStatus.ACCEPTED)

    async def _show(self, request: web.Request) -> web.Response:
        """Show a job that ended before this server knew it."""
        task_id = request.match_info["task_id"]
        if self._board.get(task_id) is None:
            try:
                end = await self._results.find(task_id)
            except DownloadFailed as error:
                return _problem(HTTPStatus.BAD_GATEWAY, "storage", str(error))
            if end is None:
                return _unknown(task_id)
            self._board.add_event(end)
        return web.json_response({"task_id": task_id})


@web.middleware
async def _end_abandoned(request: web.Request, handler: Handler) -> web.StreamResponse:
    """End a request whose sender went before its body was here, as that of an upload that was stopped; no error."""
    try:
        return await handler(request)
    except ConnectionError:
        if request.transport is not None:
            raise
        return web.Response(status=HTTPStatus.BAD_REQUEST)  # nobody reads it


async def _body(request: web.Request) -> bytes:
    """Return a body of bounded size, whatever the limit of the application. Raises ``HTTPRequestEntityTooLarge``."""
    body = await request.content.read(MAX_REQUEST_BYTES + 1)
    while len(body) <= MAX_REQUEST_BYTES and (more := await request.content.read(MAX_REQUEST_BYTES + 1)):
        body += more
    if len(body) > MAX_REQUEST_BYTES:
        raise web.HTTPRequestEntityTooLarge(MAX_REQUEST_BYTES, len(body))
    return body


def _page_file(name: str, kind: str) -> Handler:
    """Return the handler that sends one of the page's files, which is read once."""
    body = (_PAGE / name).read_bytes()

    async def send(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=kind, charset="utf-8", headers={"Cache-Control": "no-cache"})

    return send


def _client_error(error: ClientError) -> web.Response:
    if isinstance(error, QueueFull):
        wait = max(1, round(error.retry_after))
        response = _problem(HTTPStatus.SERVICE_UNAVAILABLE, "queue_full", str(error), retry_after_s=wait)
        response.headers["Retry-After"] = str(wait)
        return response
    return _problem(HTTPStatus.BAD_GATEWAY, "unreachable", str(error))


def _unknown(task_id: str) -> web.Response:
    text = f"no job {task_id} has ended: it is still queued or running, or the id is wrong"
    return _problem(HTTPStatus.NOT_FOUND, "unknown_job", text)


def _problem(status: HTTPStatus, code: str, message: str, **more: object) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message, **more}}, status=status)


_DIGITS: Final = 16
FIELDS: Final = frozenset(GenerationRequest.model_fields) - set(EMBEDDED_AUDIO)
"""Fields that the page may send: all but audio in the request itself."""


def read_form(body: object) -> tuple[dict[str, object], GenerationRequest]:
    """Return the body to publish, with a task id, and the request that a worker will parse from it.

    Raises:
        RequestInvalid: with every invalid field.
        InvalidRequest: with every field of an edit that contradicts another one or lacks what it needs.
    """
    if not isinstance(body, Mapping):
        raise RequestInvalid((FieldProblem(field="body", value=type(body).__name__, rule="must be a JSON object"),))
    unknown = sorted(str(name)[:100] for name in body if name not in FIELDS)
    if unknown:
        raise RequestInvalid(
            tuple(FieldProblem(field=name, value="…", rule="is not a field of this form") for name in unknown[:10])
        )
    given = {name: value for name, value in body.items() if value not in (None, "")}
    request, _ = parse_request(given, strict=True)
    # Without words, a song is made from another one, or from a subject that the language model writes about.
    if not any(
        (request.prompt.strip(), request.sample_query.strip(), request.src_audio_path, given.get("source_task_id"))
    ):
        raise RequestInvalid((FieldProblem(field="prompt", value="", rule="must describe the music"),))
    edits.check(request)
    if (rule := TASKS[request.task_type].source_rule(request)) is not None:
        raise RequestInvalid((FieldProblem(field="src_audio_path", value="", rule=rule),))
    beyond = tuple(beyond_every_tier(request))
    if beyond and not ("on_limit" in given and request.on_limit == "clamp"):
        raise RequestInvalid(beyond)
    return {**given, "task_id": request.task_id or str(uuid4())}, request
