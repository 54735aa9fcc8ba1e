# SPDX-License-Identifier: Apache-2.0
"""The routes: the page itself, news of jobs, songs, and what the page may ask for."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from importlib.resources import files
from typing import Final
from uuid import uuid4

from aiohttp import web

from acestep_consumer.client import Client, ClientError, DownloadFailed, QueueFull, Unreachable
from acestep_consumer.client.results import Results
from acestep_consumer.webui.audio_proxy import AudioProxy, SongUnavailable
from acestep_consumer.webui.job_board import JobBoard, UpdateFeed
from acestep_consumer.webui.job_view import file_name
from acestep_consumer.webui.origin_check import OriginCheck, add_headers
from acestep_schemas.request import TASK_ID_PATTERN, FieldProblem, GenerationRequest, RequestInvalid, parse_request

FILES: Final = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
MOST_PAGES: Final = 64
LARGEST_ORDER_BYTES: Final = 256 << 10
# A proxy or a phone drops a line that is silent; a page whose browser is gone is noticed by it.
STILL_HERE_S: Final = 15.0
# Several jobs tell twice a second each; a page is redrawn less often than that.
BETWEEN_BATCHES_S: Final = 0.2
AGAIN_MS: Final = 1000

_TASK_ID: Final = "{task_id:" + TASK_ID_PATTERN.strip("^$") + "}"


class PageServer:
    """What answers the page.

    Args:
        client: publishes orders and cancellations.
        board: what is known of jobs.
        songs: sound.
        endings: for jobs that somebody asks for by id.
    """

    def __init__(self, client: Client, board: JobBoard, songs: AudioProxy, endings: Results) -> None:
        self._client = client
        self._board = board
        self._songs = songs
        self._endings = endings
        self._closing = asyncio.Event()

    def application(self, guard: OriginCheck) -> web.Application:
        """Return the application; requests that ``guard`` refuses reach no route."""
        app = web.Application(middlewares=[guard.middleware], client_max_size=LARGEST_ORDER_BYTES)
        app.on_response_prepare.append(add_headers)
        app.on_shutdown.append(self._close)
        for path, (name, kind) in FILES.items():
            app.router.add_get(path, _PageFile(name, kind))
        app.router.add_get("/events", self._events)
        app.router.add_get(f"/audio/{_TASK_ID}/{{index:[0-9]{{1,3}}}}", self._audio)
        app.router.add_post("/jobs", self._order)
        app.router.add_post(f"/jobs/{_TASK_ID}/cancel", self._cancel)
        app.router.add_post(f"/jobs/{_TASK_ID}/show", self._show)
        return app

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._board.watched >= MOST_PAGES:
            return _problem(HTTPStatus.SERVICE_UNAVAILABLE, "too_many", f"{MOST_PAGES} pages are open already")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        # A browser that comes back by itself sends the header; a page that was hidden for a while sends the query.
        mark = request.headers.get("Last-Event-ID") or request.query.get("since", "")
        with self._board.feed(mark) as feed, suppress(ConnectionError):
            await response.prepare(request)
            await self._tell(feed, response)  # until the page is closed
        return response

    async def _tell(self, feed: UpdateFeed, response: web.StreamResponse) -> None:
        await response.write(f"retry: {AGAIN_MS}\n\n".encode())
        while not self._closing.is_set():
            try:
                await asyncio.wait_for(feed.news.wait(), STILL_HERE_S)
            except TimeoutError:
                await response.write(b": still here\n\n")
                continue
            batch = self._board.take(feed)
            await response.write(f"id: {self._board.mark}\ndata: {batch.model_dump_json()}\n\n".encode())
            await asyncio.sleep(BETWEEN_BATCHES_S)

    async def _audio(self, request: web.Request) -> web.StreamResponse:
        task_id, index = request.match_info["task_id"], int(request.match_info["index"])
        try:
            audio = await self._songs.find(task_id, index)
            name = file_name(task_id, audio) if "download" in request.query else None
            return await self._songs.send(request, audio, name)
        except SongUnavailable as error:
            return web.Response(status=error.status, text=f"{error}\n")

    async def _order(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            return _problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not_json", "send application/json")
        try:
            body, wanted = read_order(await request.json())
        except RequestInvalid as error:
            fields = [{"field": problem.field, "rule": problem.rule} for problem in error.problems]
            return _problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", str(error), fields=fields)
        except ValueError as error:
            return _problem(HTTPStatus.BAD_REQUEST, "not_json", str(error))
        task_id = str(body["task_id"])
        # Before the request is sent: its first event may be faster than the broker's confirm.
        self._board.order(task_id, wanted)
        try:
            await self._client.submit(body)
        except ClientError as error:
            (self._board.doubt if isinstance(error, Unreachable) else self._board.withdraw)(task_id)
            return _refusal(error)
        return web.json_response({"task_id": task_id}, status=HTTPStatus.ACCEPTED)

    async def _cancel(self, request: web.Request) -> web.Response:
        task_id = request.match_info["task_id"]
        if self._board.card(task_id) is None:
            return _problem(HTTPStatus.NOT_FOUND, "unknown_job", f"{task_id} is not on this page")
        try:
            await self._client.cancel(task_id)
        except ClientError as error:
            return _refusal(error)
        self._board.stop(task_id)
        return web.json_response({"task_id": task_id}, status=HTTPStatus.ACCEPTED)

    async def _show(self, request: web.Request) -> web.Response:
        """Put a job up that ended before this page heard of it."""
        task_id = request.match_info["task_id"]
        if self._board.card(task_id) is None:
            try:
                ending = await self._endings.find(task_id)
            except DownloadFailed as error:
                return _problem(HTTPStatus.BAD_GATEWAY, "storage", str(error))
            if ending is None:
                text = f"no job {task_id} has ended: it waits, it runs and was not heard of yet, or the id is wrong"
                return _problem(HTTPStatus.NOT_FOUND, "unknown_job", text)
            self._board.hear(ending)
        return web.json_response({"task_id": task_id})

    async def _close(self, _: web.Application) -> None:
        """Let pages go, which would hold up the end: they come back by themselves."""
        self._closing.set()
        self._board.wake()


class _PageFile:
    """One of the page's files, read once."""

    def __init__(self, name: str, kind: str) -> None:
        self._body = (files("acestep_consumer.webui") / "page" / name).read_bytes()
        self._kind = kind

    async def __call__(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._body, content_type=self._kind, charset="utf-8", headers={"Cache-Control": "no-cache"}
        )


def _refusal(error: ClientError) -> web.Response:
    if isinstance(error, QueueFull):
        wait = max(1, round(error.retry_after))
        response = _problem(HTTPStatus.SERVICE_UNAVAILABLE, "queue_full", str(error), retry_after_s=wait)
        response.headers["Retry-After"] = str(wait)
        return response
    return _problem(HTTPStatus.BAD_GATEWAY, "unreachable", str(error))


def _problem(status: HTTPStatus, code: str, message: str, **more: object) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message, **more}}, status=status)


FIELDS: Final = frozenset(
    {"task_id", "prompt", "lyrics", "audio_duration", "batch_size", "thinking", "audio_format", "model", "seed"}
)


def read_order(body: object) -> tuple[dict[str, object], GenerationRequest]:
    """Return the body to publish, with a task id, and the request that a worker will read from it.

    Raises:
        RequestInvalid: with every field that is wrong.
    """
    if not isinstance(body, Mapping):
        raise RequestInvalid((FieldProblem(field="body", value=type(body).__name__, rule="must be a JSON object"),))
    strange = sorted(str(name)[:100] for name in body if name not in FIELDS)
    if strange:
        raise RequestInvalid(
            tuple(FieldProblem(field=name, value="…", rule="is no field of this form") for name in strange[:10])
        )
    given = {name: value for name, value in body.items() if value not in (None, "")}
    request, _ = parse_request(given)
    if not request.prompt.strip():
        raise RequestInvalid((FieldProblem(field="prompt", value="", rule="must say what it should sound like"),))
    return {**given, "task_id": request.task_id or str(uuid4())}, request
