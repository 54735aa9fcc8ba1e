# SPDX-License-Identifier: Apache-2.0
"""The gateway on a free port, with a client and a storage that tests control."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import aiohttp
from aiohttp.test_utils import TestServer

from acestep_consumer.client import ClientError, DownloadFailed
from acestep_consumer.client.results import Results
from acestep_consumer.config.settings import Settings, load
from acestep_consumer.domain.errors import StorageRefused, StorageUnavailable
from acestep_consumer.domain.objects import ByteRange, ObjectAddress, ObjectContent
from acestep_consumer.domain.ports import Objects
from acestep_consumer.gateway.server import Gateway
from acestep_consumer.storage.lineage import Family
from acestep_schemas import examples
from acestep_schemas.events import (
    Completed,
    JobCompleted,
    JobEvent,
    TerminalEvent,
    Worker,
    WorkerEvent,
    unfinished_event,
)
from acestep_schemas.request import GenerationRequest
from tests.support.waiting import eventually

KEY = "secret-key"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


class FakeRequestClient:
    """A client without a broker: it keeps what is published, and yields the events that a test sends."""

    def __init__(self) -> None:
        self.published: list[dict[str, Any]] = []
        self.options: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self.refusal: ClientError | None = None
        self.ready: int | None = 0
        self.events: asyncio.Queue[JobEvent | WorkerEvent] = asyncio.Queue()

    async def submit(self, request: Mapping[str, object], *, priority: int = 0, traceparent: str | None = None) -> str:
        if self.refusal is not None:
            raise self.refusal
        self.published.append(json.loads(json.dumps(request)))
        self.options.append({"priority": priority, "traceparent": traceparent})
        return str(request["task_id"])

    async def cancel(self, task_id: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.cancelled.append(task_id)

    async def waiting(self) -> int | None:
        return self.ready

    async def request_statuses(self) -> None:
        """Nobody answers."""

    @asynccontextmanager
    async def subscribe(self, *routing_keys: str) -> AsyncIterator[AsyncIterator[JobEvent | WorkerEvent]]:
        yield self._received()

    async def _received(self) -> AsyncIterator[JobEvent | WorkerEvent]:
        while True:
            yield await self.events.get()


class _FakeStream:
    def __init__(self, body: bytes, size: int) -> None:
        self._body = body
        self.size = size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._body), 1000):
            yield self._body[start : start + 1000]


@dataclass
class FakeResults:
    """Manifests and objects in memory. ``reads`` counts look-ups of manifests, ``opened`` songs that are being read."""

    ends: dict[str, TerminalEvent] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    reads: int = 0
    opened: int = 0
    away: bool = False

    async def find(self, task_id: str) -> TerminalEvent | None:
        self.reads += 1
        await asyncio.sleep(0)
        return self.ends.get(task_id)

    async def family(self, task_id: str) -> Family:
        if self.away:
            raise DownloadFailed("away")
        ends = {each: end.data for each, end in self.ends.items() if isinstance(end, JobCompleted)}
        return Family({task_id: None} | ends)

    @asynccontextmanager
    async def open(self, uri: str, span: ByteRange | None = None) -> AsyncIterator[_FakeStream]:
        if uri not in self.stored:
            raise StorageRefused(uri, "NoSuchKey", missing=True)
        body = self.stored[uri]
        self.opened += 1
        try:
            yield _FakeStream(body[span.first : span.last + 1] if span else body, len(body))
        finally:
            self.opened -= 1

    async def objects(self) -> Objects:
        return cast("Objects", self)

    async def put(self, address: ObjectAddress, content: ObjectContent) -> bool:
        if self.away:
            raise StorageUnavailable("away")
        self.stored[str(address)] = content.body if isinstance(content.body, bytes) else content.body.read_bytes()
        return True

    async def delete(self, address: ObjectAddress) -> None:
        self.stored.pop(str(address), None)


@dataclass
class Served:
    """A gateway and what is around it."""

    url: str
    http: aiohttp.ClientSession
    client: FakeRequestClient
    results: FakeResults
    gateway: Gateway

    async def post(self, path: str, body: object = None, **options: Any) -> tuple[int, Any]:
        """Send JSON; returns status and JSON."""
        given: dict[str, Any] = {} if body is None else {"json": body}
        async with self.http.post(self.url + path, **given, **options) as answer:
            return answer.status, await answer.json(content_type=None)

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        """Return status and JSON."""
        async with self.http.get(self.url + path, **options) as answer:
            return answer.status, await answer.json(content_type=None)

    async def release(self, body: object, **options: Any) -> str:
        """Release a task; returns its id."""
        status, answer = await self.post("/release_task", body, **options)
        assert status == 200, answer
        return str(answer["data"]["task_id"])

    async def query(self, *task_ids: object, **more: Any) -> list[dict[str, Any]]:
        """Return the entries of these tasks."""
        status, answer = await self.post("/query_result", {"task_id_list": list(task_ids), **more})
        assert status == 200, answer
        return list(answer["data"])

    async def send(self, *events: JobEvent | WorkerEvent) -> None:
        """Let events arrive."""
        for event in events:
            self.client.events.put_nowait(event)
        await eventually(self.client.events.empty)
        await asyncio.sleep(0)


def settings_of(**variables: str) -> Settings:
    """Settings with these variables, and nothing of this machine's."""
    return load(variables, env_file=None)


@asynccontextmanager
async def gateway(
    *, results: FakeResults | None = None, connected: bool = True, **variables: str
) -> AsyncIterator[Served]:
    """Serve the API; ``connected``: a broker is there."""
    client, stored = FakeRequestClient(), results or FakeResults()

    @asynccontextmanager
    async def connect() -> AsyncIterator[FakeRequestClient]:
        if not connected:
            raise ClientError("no connection to the broker")
        yield client

    served = Gateway(settings_of(**variables), connect, cast("Results", stored))
    server = TestServer(served.application(), handler_cancellation=True)
    session = asyncio.create_task(served.run())
    async with server, aiohttp.ClientSession(auto_decompress=False) as http:
        if connected:
            await eventually(lambda: served.session.is_up)
        yield Served(str(server.make_url("")).rstrip("/"), http, client, stored, served)
    session.cancel()
    await asyncio.wait({session})


def completed(task_id: str, songs: int = 1, **data: object) -> JobCompleted:
    """The terminal event of a task with songs in its folder."""
    audio = examples.completed().data.audios[0]
    audios = tuple(
        audio.model_copy(
            update={
                "uri": f"s3://acestep/jobs/{task_id}/{index}.mp3",
                "format": "mp3",
                "seed": 40 + index,
                "bytes": 5000,
            }
        )
        for index in range(songs)
    )
    request = GenerationRequest(prompt="jazz", lyrics="la la")
    changes = {"task_id": task_id, "audios": audios, "request": request, **data}
    return JobCompleted.of(examples.completed().data.model_copy(update=changes))


def repainted(task_id: str, **data: object) -> JobCompleted:
    """The terminal event of a song with files beside it, made from an earlier song; every file has an URL."""
    whole = json.loads(examples.repainted().to_json())["data"]
    (audio,) = whole["audios"]
    for file in (audio, *audio["files"].values()):
        file["uri"] = file["uri"].replace(whole["task_id"], task_id)
        file["url"] = file["uri"].replace("s3://", "https://s3.example/") + "?X-Amz-Signature=0"
    return JobCompleted.of(Completed.model_validate({**whole, "task_id": task_id, **data}))


def unfinished(status: Any, task_id: str) -> TerminalEvent:
    """The terminal event of a task without songs."""
    return unfinished_event(examples.unfinished(status).data.model_copy(update={"task_id": task_id}))  # type: ignore[arg-type]


def started(task_id: str) -> JobEvent:
    """A ``started`` event."""
    event = examples.started()
    return event.model_copy(update={"subject": task_id, "data": event.data.model_copy(update={"task_id": task_id})})


def progress(task_id: str, share: float = 0.5) -> JobEvent:
    """A ``progress`` event."""
    event = examples.progress()
    data = event.data.model_copy(update={"task_id": task_id, "progress": share})
    return event.model_copy(update={"subject": task_id, "data": data})


def announced(**fields: Any) -> WorkerEvent:
    """A worker's announcement."""
    return WorkerEvent.of(Worker.model_validate({**examples.worker().data.model_dump(), **fields}))
