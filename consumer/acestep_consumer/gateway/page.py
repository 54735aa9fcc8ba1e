# SPDX-License-Identifier: Apache-2.0
"""The page of ``acestep-consumer listen`` on the API's port: all jobs and songs, for whoever has a key.

A browser's players and event streams send no header of our choice, so the page asks for the key as HTTP Basic
authentication does, with any user name and the key as password. Browsers then add it to requests of other sites, too:
the API takes no such login, and the page's routes that change something take no request of another site.
"""

import base64
import binascii
from collections.abc import Callable, Coroutine, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from acestep_consumer.client.results import Results
from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.gateway.answers import ApiError
from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.gateway.broker_session import BrokerSession
from acestep_consumer.webui.audio_proxy import AudioProxy
from acestep_consumer.webui.job_board import JobBoard, QueueState, look_up_silent_jobs, poll_queue_state
from acestep_consumer.webui.origin_check import HEADERS, OriginCheck, foreign_refusal
from acestep_consumer.webui.server import PageServer
from acestep_consumer.webui.source_upload import SourceUpload
from acestep_schemas.events import JobEvent, WorkerEvent

LOGIN: Final = {"WWW-Authenticate": 'Basic realm="ACE-Step: any name, and an API key as password", charset="UTF-8"'}

_SHOWN: Final = web.RequestKey("page", bool)


class WebPage:
    """The page's routes, each behind a key where one is required.

    Args:
        keys: checks keys.
        hosts: checks ``Host`` and ``Origin`` where no key is required.
        session: publishes requests, knows the queue's length.
        results: how jobs ended, and songs.
        settings: where songs are.
        upload: stores audio that the form sends.
        admit: called with the owner of a request to make songs; raises ``ApiError`` where there are too many.
    """

    def __init__(  # noqa: PLR0913 - what a page shows and does
        self,
        keys: ApiKeyCheck,
        hosts: OriginCheck,
        session: BrokerSession,
        results: Results,
        *,
        settings: StorageSettings,
        upload: SourceUpload,
        admit: Callable[[str], None],
    ) -> None:
        self._keys = keys
        self._hosts = hosts
        self._session = session
        self._results = results
        self._admit = admit
        self._board = JobBoard()
        songs = AudioProxy(settings, results, self._board.audios_of)
        self._server = PageServer(_PageClient(session), self._board, songs, results, upload)

    def add(self, event: JobEvent | WorkerEvent) -> None:
        """Show an event."""
        if isinstance(event, WorkerEvent):
            self._board.add_worker(event)
        else:
            self._board.add_event(event)

    def routes(self) -> Iterator[tuple[str, str, Handler]]:
        """Yield method, path and handler of each route."""
        for method, path, handler in self._server.routes():
            yield method, path, self._guarded(handler, submits=path == "/jobs")

    @property
    def background(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """Keeps the page up to date, beside the server."""
        return (
            lambda: look_up_silent_jobs(self._board, self._results),
            lambda: poll_queue_state(self._queue_state, self._board),
        )

    async def close(self, app: web.Application) -> None:
        """End open pages; for the application's ``on_shutdown``."""
        await self._server.close(app)

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """For the application's ``on_response_prepare``: a page may load nothing but this server's own."""
        if _SHOWN in request:
            response.headers.update(HEADERS)

    def _guarded(self, handler: Handler, *, submits: bool) -> Handler:
        async def check(request: web.Request) -> web.StreamResponse:
            owner = self._owner(request)
            if submits:
                self._admit(owner)
            request[_SHOWN] = True
            return await handler(request)

        return check

    def _owner(self, request: web.Request) -> str:
        """Return whose request it is. Raises ``ApiError`` (401, 403)."""
        method, host, origin = request.method, request.headers.get("Host", ""), request.headers.get("Origin")
        if self._keys.required:
            owner = self._keys.owner_of(_password(request.headers.get("Authorization", "")))
            if owner is None:
                raise ApiError(HTTPStatus.UNAUTHORIZED, "enter any name, and an API key as password", LOGIN)
            refused = foreign_refusal(method, host, origin)
        else:
            owner, refused = self._keys.by_header(request), self._hosts.refusal(method, host, origin)
        if refused is not None:
            raise ApiError(HTTPStatus.FORBIDDEN, refused)
        return owner

    async def _queue_state(self) -> QueueState:
        return QueueState(broker=self._session.is_up, waiting=self._session.queue_size)


class _PageClient:
    """Publishes the page's requests by the gateway's session."""

    def __init__(self, session: BrokerSession) -> None:
        self._session = session

    async def submit(self, request: Mapping[str, object]) -> None:
        await self._session.submit(request)

    async def cancel(self, task_id: str) -> None:
        await self._session.cancel(task_id)

    async def waiting(self) -> int | None:
        return self._session.queue_size


def _password(authorization: str) -> str:
    """Return the password of HTTP Basic authentication; empty where there is none."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
