# SPDX-License-Identifier: Apache-2.0
"""The application: its parts, its routes, and what runs beside them."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from acestep_consumer.client.results import Results
from acestep_consumer.config.settings import Settings
from acestep_consumer.gateway.answers import add_request_id, answer_errors
from acestep_consumer.gateway.audio_routes import AudioRoutes, SongFinder
from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.gateway.broker_session import BrokerSession, RequestClient
from acestep_consumer.gateway.chat_routes import ChatRoutes
from acestep_consumer.gateway.job_routes import JobRoutes
from acestep_consumer.gateway.messages import MessageBuilder
from acestep_consumer.gateway.metrics import GatewayMetrics
from acestep_consumer.gateway.model_routes import ModelRoutes
from acestep_consumer.gateway.openapi import document
from acestep_consumer.gateway.origins import OriginPolicy
from acestep_consumer.gateway.page import WebPage
from acestep_consumer.gateway.rate_limit import RateLimit
from acestep_consumer.gateway.result_folder import ResultFolder
from acestep_consumer.gateway.sample_routes import SampleRoutes
from acestep_consumer.gateway.spans import PREFIX, trace_requests
from acestep_consumer.gateway.submission import Submission
from acestep_consumer.gateway.task_routes import TaskRoutes
from acestep_consumer.gateway.tasks import TaskStates
from acestep_consumer.gateway.uploads import UploadSpool, UploadStore
from acestep_consumer.gateway.worker_list import WorkerList
from acestep_consumer.webui.audio_proxy import AudioProxy
from acestep_consumer.webui.origin_check import OriginCheck
from acestep_schemas.events import JobEvent, WorkerEvent
from acestep_schemas.request import TASK_ID_PATTERN

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

LOOPBACK: Final = "127.0.0.1"
_TASK_ID: Final = "{task_id:" + TASK_ID_PATTERN.strip("^$") + "}"
_ADDED_BYTES: Final = 4096
"""Room in a message for what is added to a body."""


@dataclass(frozen=True, slots=True)
class ApiRoute:
    """One route. ``path`` is the template in the router, ``handler`` answers."""

    method: str
    path: str
    handler: Handler

    @property
    def name(self) -> str:
        """The path as it is documented."""
        return self.path.replace(_TASK_ID, "{task_id}")


class Gateway:
    """ACE-Step's REST API over the queue.

    Args:
        settings: all settings.
        connect: opens a client of the broker.
        results: results in storage.
        songs: the same over connections of their own, which slow players may hold; None: ``results``.
        upload_folder: returns the folder of uploads on their way; None: ACESTEP_SCRATCH_DIR itself.
    """

    def __init__(
        self,
        settings: Settings,
        connect: "Callable[[], AbstractAsyncContextManager[RequestClient]]",
        results: Results,
        songs: Results | None = None,
        upload_folder: Callable[[], Path] | None = None,
    ) -> None:
        self._settings = settings
        self.keys = ApiKeyCheck(settings.gateway.keys)
        folder = ResultFolder(settings.storage)
        self.tasks = TaskStates(results, folder)
        self.workers = WorkerList(settings.gateway.models)
        self.session = BrokerSession(connect, self._add)
        finder = SongFinder(self.tasks)
        spool = UploadSpool(settings.inputs.max_bytes, upload_folder or (lambda: settings.engine.scratch_dir))
        max_bytes = settings.broker.max_message_bytes
        rate_limit = RateLimit(settings.gateway.tasks_per_minute)
        submission = Submission(
            self.session,
            self.tasks,
            MessageBuilder(settings.gateway, settings.inputs, finder.address),
            UploadStore(results, settings.storage),
            rate_limit=rate_limit,
            max_bytes=max_bytes,
        )
        proxy = AudioProxy(settings.storage, songs or results, finder.known)
        self._task_routes = TaskRoutes(
            self.keys, submission, self.tasks, self.session, spool, max_bytes=max_bytes - _ADDED_BYTES
        )
        self._audio_routes = AudioRoutes(self.keys, finder, proxy)
        self._model_routes = ModelRoutes(
            self.keys, self.workers, self.tasks, self.session, queue_maxsize=settings.broker.queue_maxsize
        )
        self._sample_routes = SampleRoutes(self.keys, submission, self.workers)
        self._job_routes = JobRoutes(self.keys, self.tasks, results, folder)
        self._chat_routes = ChatRoutes(
            self.keys, submission, spool, songs or results, timeout_s=settings.gateway.generation_timeout_s
        )
        # Hosts are checked without a key alone, and then it listens on loopback.
        self._hosts = OriginCheck(LOOPBACK)
        self._page = (
            WebPage(self.keys, self._hosts, self.session, results, settings=settings.storage, admit=rate_limit.admit)
            if settings.gateway.page
            else None
        )
        self._metrics = GatewayMetrics(self.keys, self.session, (route.path for route in self._api()))

    def application(self) -> web.Application:
        """Return the application."""
        policy = OriginPolicy(self.keys, self._hosts, self._settings.gateway.origins)
        app = web.Application(middlewares=[self._metrics.middleware, trace_requests, answer_errors, policy.middleware])
        app.on_response_prepare.extend((policy.on_prepare, add_request_id))
        app.on_shutdown.append(self._job_routes.close)
        for route in self.routes():
            for prefix in ("", PREFIX):
                app.router.add_route(route.method, prefix + route.path, route.handler)
                if route.method == "GET" and route.handler != self._job_routes.events:
                    app.router.add_route("HEAD", prefix + route.path, route.handler)
        if self._page is not None:
            app.on_response_prepare.append(self._page.add_headers)
            app.on_shutdown.append(self._page.close)
            for method, path, handler in self._page.routes():
                app.router.add_route(method, path, handler)
        return app

    async def run(self) -> None:
        """Hold the session with the broker, and keep the page up to date, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.session.run(), name="broker session")
            for each in () if self._page is None else self._page.background:
                tasks.create_task(each())

    def routes(self) -> tuple[ApiRoute, ...]:
        """Return all routes; ``HEAD`` goes with each ``GET`` that ends."""
        return (*self._api(), ApiRoute("GET", "/metrics", self._metrics.page))

    def _api(self) -> Iterator[ApiRoute]:
        yield from self._task_table()
        yield from self._model_table()
        yield ApiRoute("POST", "/v1/chat/completions", self._chat_routes.complete)
        yield ApiRoute("GET", "/openapi.json", self._openapi)

    def _task_table(self) -> Iterator[ApiRoute]:
        tasks, jobs, samples = self._task_routes, self._job_routes, self._sample_routes
        yield ApiRoute("POST", "/release_task", tasks.release)
        yield ApiRoute("POST", "/query_result", tasks.query)
        yield ApiRoute("GET", "/v1/audio", self._audio_routes.audio)
        yield ApiRoute("POST", "/cancel_task", tasks.cancel)
        yield ApiRoute("DELETE", f"/release_task/{_TASK_ID}", tasks.delete)
        yield ApiRoute("GET", f"/v1/jobs/{_TASK_ID}", jobs.show)
        yield ApiRoute("GET", f"/v1/jobs/{_TASK_ID}/events", jobs.events)
        yield ApiRoute("GET", f"/v1/jobs/{_TASK_ID}/lineage", jobs.lineage)
        yield ApiRoute("POST", "/create_random_sample", samples.random)
        yield ApiRoute("POST", "/format_input", samples.format)
        yield ApiRoute("POST", "/v1/create_sample", samples.create)

    def _model_table(self) -> Iterator[ApiRoute]:
        models = self._model_routes
        yield ApiRoute("GET", "/health", models.health)
        yield ApiRoute("GET", "/healthz", models.live)
        yield ApiRoute("GET", "/readyz", models.ready)
        yield ApiRoute("GET", "/v1/models", models.models)
        yield ApiRoute("GET", "/v1/model_inventory", models.inventory)
        yield ApiRoute("GET", "/v1/stats", models.stats)
        yield ApiRoute("POST", "/v1/init", models.init)
        yield ApiRoute("GET", "/v1/lora/status", models.lora_status)
        for name in ("load", "unload", "toggle", "scale"):
            yield ApiRoute("POST", f"/v1/lora/{name}", models.no_lora)
        yield ApiRoute("POST", "/v1/reinitialize", models.no_reload)
        yield ApiRoute("POST", "/v1/transcribe", models.no_transcription)
        for subject in ("training", "dataset"):
            for method in ("GET", "POST"):
                yield ApiRoute(method, f"/v1/{subject}/{{rest:.*}}", models.no_training)

    async def _openapi(self, request: web.Request) -> web.Response:
        self.keys.by_header(request)
        return web.json_response(document())

    def _add(self, event: JobEvent | WorkerEvent) -> None:
        if isinstance(event, WorkerEvent):
            self.workers.add(event.data)
        else:
            self.tasks.add(event)
        if self._page is not None:
            self._page.add(event)
