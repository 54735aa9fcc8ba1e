# SPDX-License-Identifier: Apache-2.0
"""A worker between proxies, and eyes on both of its sides: what most fault tests need."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from acestep_consumer.broker.topology import GENERATE
from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.faulty_s3 import FaultyS3
from tests.support.object_store import ObjectStore
from tests.support.proxy import Proxy
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

    from aiohttp import web

# What the worker calls its connections; see `Where.of`.
PUBLISHING, CONSUMING = b" publish", b" consume"


@dataclass(frozen=True)
class Scenario:
    """A light worker whose broker is behind ``amqp`` and whose storage is behind ``s3``; the others look directly."""

    worker: WorkerProcess
    amqp: Proxy
    s3: FaultyS3
    recorder: EventRecorder
    peer: Peer
    object_store: ObjectStore

    async def is_ready(self) -> None:
        """Wait until the worker says that it is. It asks its storage, which this event loop may serve."""
        deadline = time.monotonic() + WITHIN_S
        while (await asyncio.to_thread(self.worker.get, "/readyz"))[0] != HTTPStatus.OK:
            assert time.monotonic() < deadline, f"not ready within {WITHIN_S:g} s"

    async def consumes(self) -> None:
        """Wait until the worker takes messages, a moment after it is ready: one that expires soon waits no longer."""
        await eventually(lambda: self.worker.log_lines(event="ready"), WITHIN_S)

    async def all_ended(self, *task_ids: str, within_s: float = WITHIN_S) -> None:
        """Wait until a terminal event of each was heard."""
        await eventually(lambda: all(map(self.recorder.terminal, task_ids)), within_s)

    async def ended(self, count: int, task_ids: Iterable[str]) -> None:
        """Wait until terminal events of so many of these were heard."""
        await eventually(lambda: sum(map(bool, map(self.recorder.terminal, task_ids))) >= count, WITHIN_S)

    async def assert_completed_once(self, *task_ids: str) -> None:
        """Every copy of each one's end says the same, and the bucket has what it promises."""
        for task_id in task_ids:
            told = self.recorder.terminal(task_id)
            assert {event.state for event in told} == {"completed"}
            assert len({event.body for event in told}) == 1
            assert await self.object_store.wrongs(told[0].data) == []

    async def assert_nothing_left(self) -> None:
        """Have the worker leave: what it had not settled would be ready again, unless another worker takes it."""
        await asyncio.to_thread(self.worker.process.end, WITHIN_S)
        assert await self.peer.ready(GENERATE) == 0


@asynccontextmanager
async def scenario(environment: dict[str, str], folder: Path, **variables: str) -> AsyncIterator[Scenario]:
    """Start a worker with these variables between proxies, in a folder of its own."""
    async with AsyncExitStack() as stack:
        url = environment["ACESTEP_AMQP_URL"]
        amqp = await stack.enter_async_context(Proxy.for_url(url))
        s3 = await stack.enter_async_context(FaultyS3(environment["ACESTEP_S3_ENDPOINT"]))
        through = {"ACESTEP_AMQP_URL": amqp.url(url), "ACESTEP_S3_ENDPOINT": s3.endpoint}
        own = folder / "between-proxies"
        own.mkdir()
        worker = WorkerProcess(own, environment | through | variables, light=True)
        await stack.enter_async_context(running(worker))
        # What the URL asks for is the worker's: a heartbeat of a second is too short for this event loop.
        direct = url.partition("?")[0]
        recorder = await stack.enter_async_context(EventRecorder(direct))
        peer = await stack.enter_async_context(Peer(direct))
        yield Scenario(worker, amqp, s3, recorder, peer, ObjectStore.of(environment))


def manifest_of(task_id: str, method: str) -> Callable[[web.Request], bool]:
    """Match this request for a task's manifest."""
    return lambda request: request.method == method and request.path.endswith(f"/{task_id}/manifest.json")
