# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer listen`` as a person runs it, with a light worker on the same queue."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
import time
import uuid
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import aio_pika
import aiohttp
import boto3
import numpy as np
import pytest

from acestep_consumer.audio.codec import encode
from acestep_consumer.broker.topology import EVENTS
from acestep_schemas import examples
from acestep_schemas.events import (
    CONTENT_TYPE,
    Audio,
    JobCompleted,
    JobEvent,
    TerminalEvent,
    Unfinished,
    unfinished_event,
)
from acestep_schemas.request import GenerationRequest
from infra.local.process import Process, tail
from infra.local.s3 import SeaweedFS
from infra.local.stack import Environment
from tests.support.broker import Peer
from tests.support.waiting import WITHIN_S
from tests.support.worker import COMMAND, ROOT, WorkerProcess, clean_environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path
    from types import TracebackType

    from infra.local.rabbitmq import RabbitMQ
    from tests.support.servers import ManagementApi

# As few as can be: tests fill the queue.
RUNNING, WAITING = 2, 2
_RATE = 48_000


class ListenProcess:
    """The command on a free port; entering waits for the address that it prints. Subclasses run another ``command``."""

    command = "listen"

    def __init__(self, folder: Path, variables: dict[str, str], *arguments: str) -> None:
        self._command = [*COMMAND, self.command, *(arguments or ("--port", "0"))]
        self._environment = clean_environment(variables)
        self.log = folder / f"{self.command}-{uuid.uuid4().hex}.log"
        self.url = ""
        self.process: Process

    def __enter__(self) -> Self:
        self.process = Process(self._command, env=self._environment, folder=ROOT, log=self.log, guarded=True)
        deadline = time.monotonic() + WITHIN_S
        while (found := re.search(r"^(http://\S+)/$", self.log.read_text(), re.MULTILINE)) is None:
            if not self.process.running() or time.monotonic() > deadline:
                self.process.end()
                raise AssertionError(tail(self.log))
            time.sleep(0.05)
        self.url = found[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.end(10)
        assert error is not None or "Traceback" not in self.log.read_text(), tail(self.log)


class GatewayProcess(ListenProcess):
    """`acestep-consumer gateway` on a free port."""

    command = "gateway"


@dataclass(frozen=True)
class Listening:
    """A page, a worker, and the settings of both."""

    page: ListenProcess
    worker: WorkerProcess
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return self.page.url


@pytest.fixture(scope="module")
def listening(
    rabbitmq: RabbitMQ, management: ManagementApi, s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Listening]:
    """A page and a light worker on a virtual host and a prefix of their own, for one file's tests."""
    with _virtual_host(management) as vhost:
        servers = Environment.of(rabbitmq.vhost_url(vhost), s3)
        environment = servers.variables() | {
            "ACESTEP_S3_PREFIX": vhost,
            "ACESTEP_QUEUE_WORKERS": str(RUNNING),
            "ACESTEP_QUEUE_MAXSIZE": str(WAITING),
        }
        folder = tmp_path_factory.mktemp("listening")
        with WorkerProcess(folder, environment, light=True) as worker, ListenProcess(folder, environment) as page:
            yield Listening(page, worker, environment)


@pytest.fixture
def unattended(listening: Listening, management: ManagementApi, tmp_path: Path) -> Iterator[Listening]:
    """A page on a virtual host of its own, with the queues declared and no worker."""
    with _virtual_host(management) as vhost:
        url = listening.environment["ACESTEP_AMQP_URL"].rpartition("/")[0]
        environment = listening.environment | {"ACESTEP_AMQP_URL": f"{url}/{vhost}"}
        declared = subprocess.run(
            [*COMMAND, "topology", "--declare"],
            env=clean_environment(environment),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )
        assert declared.returncode == 0, declared.stderr
        with ListenProcess(tmp_path, environment) as page:
            yield Listening(page, listening.worker, environment)


@contextmanager
def _virtual_host(management: ManagementApi) -> Iterator[str]:
    vhost = f"listen-{uuid.uuid4().hex}"
    management.add_vhost(vhost)
    try:
        yield vhost
    finally:
        management.delete_vhost(vhost)


async def publish_events(listening: Listening, *events: JobEvent) -> None:
    """Publish events as a worker does."""
    async with Peer(listening.environment["ACESTEP_AMQP_URL"]) as peer:
        exchange = await peer.channel.get_exchange(EVENTS, ensure=False)
        for event in events:
            await exchange.publish(aio_pika.Message(event.to_json(), content_type=CONTENT_TYPE), event.routing_key)


def ended(status: Any, task_id: str, **error: object) -> TerminalEvent:
    """The terminal event of a job without songs; ``error`` replaces fields of the example's."""
    data = examples.unfinished(status).data
    assert isinstance(data, Unfinished)
    changes = {"task_id": task_id, "error": data.error.model_copy(update=error)}
    return unfinished_event(data.model_copy(update=changes))


def made(task_id: str, *audios: Audio, prompt: str = "", lyrics: str = "", **data: object) -> JobCompleted:
    """The terminal event of a job with these songs; ``data`` replaces other fields of the example's."""
    request = GenerationRequest(prompt=prompt or task_id, lyrics=lyrics)
    changes = {"task_id": task_id, "request": request, "audios": audios, **data}
    return JobCompleted.of(examples.completed().data.model_copy(update=changes))


def record(listening: Listening, folder: Path, task_id: str, audio_format: str, seconds: float = 12.0) -> Audio:
    """Store a song in the job's folder in S3: a swelling tone, encoded as the worker does."""
    at = np.arange(int(seconds * _RATE), dtype=np.float32) / _RATE
    tone = (np.sin(2 * np.pi * 220 * at) * at / seconds / 2).astype(np.float32)
    encoded = encode(np.stack((tone, tone)), folder / "0", audio_format, _RATE)
    return keep(
        listening,
        f"{task_id}/{encoded.path.name}",
        encoded.path.read_bytes(),
        format=audio_format,
        sample_rate=encoded.sample_rate,
        duration_s=encoded.duration_s,
    )


def keep(listening: Listening, name: str, body: bytes, **audio: object) -> Audio:
    """Store an object below the prefix and return its entry for an event; ``audio`` replaces fields of that."""
    variables = listening.environment
    storage = boto3.client(
        "s3",
        endpoint_url=variables["ACESTEP_S3_ENDPOINT"],
        region_name=variables["AWS_DEFAULT_REGION"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
    )
    bucket, key = variables["ACESTEP_S3_BUCKET"], f"{variables['ACESTEP_S3_PREFIX']}/{name}"
    storage.put_object(Bucket=bucket, Key=key, Body=body)
    storage.close()
    facts = {"uri": f"s3://{bucket}/{key}", "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(), **audio}
    return examples.completed().data.audios[0].model_copy(update=facts)


class PageClient:
    """Sends the requests of the page's script, without a browser."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = session

    async def post(self, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        """Send a request as the page does; returns status and JSON, or text. ``headers`` replace the page's own."""
        own = {"Origin": self.url} | {name.title(): value for name, value in headers.items()}
        async with self.http.post(self.url + path, json=body or {}, headers=own) as answer:
            is_json = answer.content_type == "application/json"
            return answer.status, await (answer.json() if is_json else answer.text())

    async def submit(self, **fields: object) -> str:
        """Submit a job, in the one format that the light worker has; returns its id."""
        status, answer = await self.post("/jobs", {"audio_format": "wav"} | fields)
        assert status == 202, answer
        return str(answer["task_id"])

    async def until(self, task_id: str, *states: str) -> dict[str, Any]:
        """Wait for one of these states of a job; returns its view."""
        async with asyncio.timeout(WITHIN_S), self.updates() as received:
            async for _, update in received:
                for view in update["cards"]:
                    if view["task_id"] != task_id:
                        continue
                    if view["state"] in states:
                        return dict(view)
                    assert view["state"] in ("waiting", "running"), view
        raise AssertionError("the updates ended")

    @asynccontextmanager
    async def updates(
        self, cursor: str = "", query: str = ""
    ) -> AsyncIterator[AsyncIterator[tuple[str, dict[str, Any]]]]:
        """Receive updates, each with its cursor; ``cursor``: the last one received."""
        headers = {"Last-Event-ID": cursor} if cursor else {}
        async with self.http.get(f"{self.url}/events{query}", headers=headers) as answer:
            assert answer.content_type == "text/event-stream"
            yield _updates(answer)


async def _updates(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    cursor = ""
    async for line in answer.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "id":
            cursor = value
        elif name == "data":
            yield cursor, json.loads(value)
