# SPDX-License-Identifier: Apache-2.0
"""The ground that all contenders run on: a filled queue before, and a look at what they left behind after."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import aio_pika
from aio_pika.exceptions import AMQPError

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.topology import EVENTS, GENERATE, UNROUTED
from acestep_consumer.config.settings import Settings, load
from tests.bench.chore import AUDIO, LEAST, WORK_VARIABLE, request_fields, s3_client
from tests.bench.throughput import Throughput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aio_pika.abc import AbstractChannel, AbstractQueue
    from pamqp.common import FieldValue

TASK = "generate"
_LONGEST_QUEUE = 1_000_000
_HEARD = {"completed": "bench.completed", "started": "bench.started"}
_WORKERS = ("worker", "observed")
_CONNECT_S = 15
_PUBLISHES_AT_ONCE = 200
_DELETES_AT_ONCE = 1000

Referee = Callable[["asyncio.subprocess.Process"], Awaitable[None]]
"""Talks with a contender while it runs; returns when there is no more to say."""


class BenchError(Exception):
    """The numbers would mean nothing; the text says why."""


def settings_for(prefetch: int, **more: str) -> Settings:
    """Return the worker's settings for this prefetch, on the servers that the environment names; ``more`` replace."""
    return load(
        env_file=None,
        overrides={
            "ACESTEP_QUEUE_WORKERS": str(prefetch),
            "ACESTEP_API_WORKERS": str(prefetch),
            "ACESTEP_QUEUE_MAXSIZE": str(_LONGEST_QUEUE),
            "ACESTEP_WORKER_ID": "bench",
            "ACESTEP_HTTP_PORT": "0",
            "ACESTEP_LOG_LEVEL": "warning",
            "ACESTEP_S3_PREFIX": os.environ.get("ACESTEP_S3_PREFIX", "bench"),
            **more,
        },
    )


class Arena:
    """Fills the queue, runs one contender, counts what it did. An async context manager."""

    def __init__(self) -> None:
        self._settings = settings_for(1)
        self._s3 = s3_client(self._settings, connections=10)

    async def __aenter__(self) -> Self:
        url = self._settings.broker.url.get_secret_value()
        try:
            async with asyncio.timeout(_CONNECT_S), BrokerConnection(self._settings.broker, "bench"):
                pass  # it declares the topology
            self._connection = await aio_pika.connect(url)
        except (BrokerRefused, TimeoutError) as error:
            raise BenchError(f"no broker to run on: {error or 'ACESTEP_AMQP_URL does not answer'}") from error
        self._channel = await self._connection.channel(on_return_raises=True)
        self._requests = await self._channel.declare_queue(GENERATE, passive=True)
        if self._requests.declaration_result.message_count:
            raise BenchError(f"{GENERATE} holds somebody's messages: give the benchmark a broker of its own")
        self._heard = {state: await _listen(self._channel, state, name) for state, name in _HEARD.items()}
        return self

    async def __aexit__(self, *_: object) -> None:
        # The request queue has the benchmark's own length limit: a worker that comes later must find another.
        for queue in (self._requests, *self._heard.values()):
            await queue.delete(if_unused=False, if_empty=False)
        await self._connection.close()

    async def run(self, contender: str, prefetch: int, messages: int, limit_s: float) -> Throughput:
        """Let a contender work off a queue of ``messages``. Raises ``BenchError`` when it did not do its work."""
        words = await self.work_off(contender, prefetch, messages, limit_s)
        return Throughput(**json.loads(words[-1]))

    async def work_off(
        self,
        contender: str,
        prefetch: int,
        messages: int,
        limit_s: float,
        *,
        variables: Mapping[str, str] | None = None,
        referee: Referee | None = None,
        log: BinaryIO | None = None,
    ) -> list[bytes]:
        """Let a contender work off a queue of ``messages``; return the lines that it printed, one at least.

        Args:
            contender: its module.
            prefetch: unacked deliveries that it may have.
            messages: how many.
            limit_s: seconds that it may take.
            variables: more for its environment.
            referee: reads what it prints, up to a point, and may write to it.
            log: a file for what it says on standard error; None: the terminal.

        Raises:
            BenchError: it did not do its work.
        """
        prefix = f"bench-{uuid.uuid4().hex[:12]}"
        task_ids = [str(uuid.uuid4()) for _ in range(messages)]
        await self._fill(task_ids, wrapped=contender == "taskiq_rabbit", traced=contender == "observed")
        command = [sys.executable, "-m", f"tests.bench.contenders.{contender}", str(prefetch), str(messages)]
        environment = {**os.environ, **(variables or {}), "ACESTEP_S3_PREFIX": prefix}
        try:
            words = await _race(contender, command, environment, limit_s, referee, log)
            await self._check(contender, task_ids, prefix)
        finally:
            await asyncio.to_thread(self._clear, prefix)
            for queue in (*self._heard.values(), self._requests, await self._queue(UNROUTED)):
                await queue.purge()
        return words

    async def _fill(self, task_ids: list[str], *, wrapped: bool, traced: bool) -> None:
        messages = [_message(_body(task_id, wrapped=wrapped), traced=traced) for task_id in task_ids]
        for start in range(0, len(messages), _PUBLISHES_AT_ONCE):
            await asyncio.gather(*map(self._publish, messages[start : start + _PUBLISHES_AT_ONCE]))

    async def _publish(self, message: aio_pika.Message) -> None:
        # Straight to the queue: that is where a request is when the clock starts.
        await self._channel.default_exchange.publish(message, GENERATE)

    async def _check(self, contender: str, task_ids: list[str], prefix: str) -> None:
        """Every message left its song, its manifest and its event, and nothing went back to the queue."""
        wanted, least = set(task_ids), os.environ.get(WORK_VARIABLE) == LEAST
        told = [json.loads(body)["subject"] for body in await _drain(self._heard["completed"])]
        started = (await self._queue(_HEARD["started"])).declaration_result.message_count
        sizes = await asyncio.to_thread(self._stored, prefix)
        songs = {f"{prefix}/{task_id}/0.wav" for task_id in wanted}
        manifests = {f"{prefix}/{task_id}/manifest.json" for task_id in wanted}
        facts = {
            "the queue is empty": not (await self._queue(GENERATE)).declaration_result.message_count,
            "one completed event each": sorted(told) == sorted(wanted),
            "one started event each": started == len(wanted) or (least and contender not in _WORKERS),
            "one song and one manifest each": set(sizes) == songs | manifests,
            "songs are whole": all(sizes.get(key) == len(AUDIO) for key in songs),
        }
        if wrong := [fact for fact, holds in facts.items() if not holds]:
            raise BenchError(f"{contender}: not so: {'; '.join(wrong)}")

    async def _queue(self, name: str) -> AbstractQueue:
        return await self._channel.declare_queue(name, passive=True)

    def _stored(self, prefix: str) -> dict[str, int]:
        pages = self._s3.get_paginator("list_objects_v2").paginate(
            Bucket=self._settings.storage.bucket, Prefix=f"{prefix}/"
        )
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", ())}

    def _clear(self, prefix: str) -> None:
        keys = list(self._stored(prefix))
        for start in range(0, len(keys), _DELETES_AT_ONCE):
            doomed: Any = [{"Key": key} for key in keys[start : start + _DELETES_AT_ONCE]]
            self._s3.delete_objects(Bucket=self._settings.storage.bucket, Delete={"Objects": doomed, "Quiet": True})


async def _race(
    contender: str,
    command: list[str],
    environment: Mapping[str, str],
    limit_s: float,
    referee: Referee | None,
    log: BinaryIO | None,
) -> list[bytes]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=pipe, stderr=log, stdin=None if referee is None else pipe
    )
    try:
        async with asyncio.timeout(limit_s):
            if referee is not None:
                await referee(process)
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise BenchError(f"{contender} was not done after {limit_s:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = output.splitlines()
    if process.returncode or not lines:
        if log is not None:
            log.seek(0)
            sys.stderr.write(log.read().decode())
        raise BenchError(f"{contender} ended with status {process.returncode}; its words are above")
    return lines


def _message(body: bytes, *, traced: bool) -> aio_pika.Message:
    """A request; ``traced`` by a producer that has its traces recorded."""
    headers: dict[str, FieldValue] | None = (
        {"traceparent": f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"} if traced else None
    )
    mode = aio_pika.DeliveryMode.PERSISTENT
    return aio_pika.Message(body, content_type="application/json", delivery_mode=mode, headers=headers)


def _body(task_id: str, *, wrapped: bool) -> bytes:
    """The request; ``wrapped`` as taskiq's producers send it."""
    fields = request_fields(task_id)
    if wrapped:
        fields = {"task_id": task_id, "task_name": TASK, "labels": {}, "args": [], "kwargs": {"request": fields}}
    return json.dumps(fields).encode()


async def _listen(channel: AbstractChannel, state: str, name: str) -> AbstractQueue:
    """Bind a durable queue, as a subscriber has it: a persistent event is on disk before it is confirmed."""
    try:
        queue = await channel.declare_queue(name, durable=True)
        await queue.bind(EVENTS, f"job.{state}.#")
        await queue.purge()
    except AMQPError as error:
        raise BenchError(f"no queue {name}: {error}") from error
    return queue


async def _drain(queue: AbstractQueue) -> list[bytes]:
    """Take everything that waits there now."""
    waiting = (await queue.channel.declare_queue(queue.name, passive=True)).declaration_result.message_count
    bodies: list[bytes] = []
    if waiting:
        async with queue.iterator(no_ack=True) as messages:
            async for message in messages:
                bodies.append(message.body)
                if len(bodies) == waiting:
                    break
    return bodies
