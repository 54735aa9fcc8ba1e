# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer listen`` as a person runs it, with a light worker on the same queue."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import pytest

from infra.local.process import Process, tail
from infra.local.s3 import REGION, SeaweedFS
from infra.local.stack import Environment
from tests.support.worker import COMMAND, ROOT, WorkerProcess, clean_environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path
    from types import TracebackType

    from infra.local.rabbitmq import RabbitMQ
    from tests.support.servers import ManagementApi

WITHIN_S = 20.0
# As few as can be: tests fill the queue.
IN_HAND, WAITING = 2, 2


class ListenProcess:
    """The command on a free port; entering waits for the address that it prints."""

    def __init__(self, folder: Path, variables: dict[str, str], *arguments: str) -> None:
        self._command = [*COMMAND, "listen", *(arguments or ("--port", "0"))]
        self._environment = clean_environment(variables)
        self.log = folder / f"listen-{uuid.uuid4().hex}.log"
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


@dataclass(frozen=True)
class Listening:
    """A page, the worker that sings, and the settings of both."""

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
        servers = Environment(
            amqp_url=rabbitmq.vhost_url(vhost),
            s3_endpoint=s3.endpoint,
            s3_bucket=s3.bucket,
            access_key=s3.access_key,
            secret_key=s3.secret_key,
            region=REGION,
        )
        environment = servers.variables() | {
            "ACESTEP_S3_PREFIX": vhost,
            "ACESTEP_QUEUE_WORKERS": str(IN_HAND),
            "ACESTEP_QUEUE_MAXSIZE": str(WAITING),
        }
        folder = tmp_path_factory.mktemp("listening")
        with WorkerProcess(folder, environment, light=True) as worker, ListenProcess(folder, environment) as page:
            yield Listening(page, worker, environment)


@contextmanager
def _virtual_host(management: ManagementApi) -> Iterator[str]:
    vhost = f"listen-{uuid.uuid4().hex}"
    management.add_vhost(vhost)
    try:
        yield vhost
    finally:
        management.delete_vhost(vhost)


class Visitor:
    """What the page's script does, without a browser."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = session

    async def post(self, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        """Ask as the page does; status and JSON, or text where there is no JSON. ``headers`` replace the page's own."""
        own = {"Origin": self.url} | {name.title(): value for name, value in headers.items()}
        async with self.http.post(self.url + path, json=body or {}, headers=own) as answer:
            is_json = answer.content_type == "application/json"
            return answer.status, await (answer.json() if is_json else answer.text())

    async def order(self, **fields: object) -> str:
        """Submit a job, in the one format that the light worker knows; its id."""
        status, answer = await self.post("/jobs", {"audio_format": "wav"} | fields)
        assert status == 202, answer
        return str(answer["task_id"])

    async def until(self, task_id: str, *states: str) -> dict[str, Any]:
        """Wait for one of these states of a job; its card."""
        async with asyncio.timeout(WITHIN_S), self.news() as batches:
            async for _, batch in batches:
                for card in batch["cards"]:
                    if card["task_id"] != task_id:
                        continue
                    if card["state"] in states:
                        return dict(card)
                    assert card["state"] in ("waiting", "running"), card
        raise AssertionError("the news ended")

    @asynccontextmanager
    async def news(self, mark: str = "") -> AsyncIterator[AsyncIterator[tuple[str, dict[str, Any]]]]:
        """Hear batches, each with its mark; ``mark``: what was heard last."""
        headers = {"Last-Event-ID": mark} if mark else {}
        async with self.http.get(self.url + "/events", headers=headers) as answer:
            assert answer.content_type == "text/event-stream"
            yield _batches(answer)


async def _batches(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    mark = ""
    async for line in answer.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "id":
            mark = value
        elif name == "data":
            yield mark, json.loads(value)
