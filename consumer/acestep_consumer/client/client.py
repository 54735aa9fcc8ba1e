# SPDX-License-Identifier: Apache-2.0
"""The client: a connection to the broker, and everything a producer or a subscriber does with it."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self
from uuid import uuid4

import aio_pika

from acestep_consumer.broker.errors import BrokerError, BrokerRefused, Nacked, Unroutable, describe
from acestep_consumer.broker.topology import CONTROL, EVENTS, GENERATE, REQUESTS
from acestep_consumer.client.connection import NOT_DECLARED, ClientConnection, as_client_error
from acestep_consumer.client.dispatcher import Dispatcher
from acestep_consumer.client.errors import DownloadFailed, InvalidTaskId, NoQueue, NoSongs, QueueFull
from acestep_consumer.client.estimate import QueueEstimate, RequestQueueDepth, outlook_of
from acestep_consumer.client.job import JobHandle
from acestep_consumer.client.results import Results
from acestep_consumer.client.retry_after import RetryAfter
from acestep_consumer.client.subscription import Subscription
from acestep_consumer.client.worker_survey import QUESTION, muster
from acestep_schemas.events import Audio, JobCompleted, JobEvent, TerminalEvent, Worker, WorkerEvent
from acestep_schemas.request import TASK_ID_PATTERN

if TYPE_CHECKING:
    from acestep_consumer.config.settings import StorageSettings

ROUTING_KEY: Final = "generate"
MAY_NOT_ASK: Final = f"this login may not hear {EVENTS}, or not publish `{QUESTION}` to {CONTROL}"
EVERYTHING: Final = ("job.#", "worker.#")
_TASK_ID: Final = re.compile(TASK_ID_PATTERN)


class Client:
    """A producer's and subscriber's connection; an async context manager. A lost connection is made again by itself.

    Args:
        url: the broker, ``amqp://`` or ``amqps://``; of a cluster, its nodes' URLs, comma-separated. None: broker and
            storage as the environment and ``.env`` say (``ACESTEP_AMQP_URL``, ``ACESTEP_S3_…``, ``AWS_…``).
        storage: where results are. Without it, downloads need presigned URLs in the events, and a job that had ended
            before anybody listened to it cannot be told from one that waits.
        patience_s: how long a publish goes on over lost connections, in seconds.
    """

    def __init__(
        self, url: str | None = None, *, storage: "StorageSettings | None" = None, patience_s: float = 30.0
    ) -> None:
        if url is None:
            from acestep_consumer.config.settings import load  # noqa: PLC0415 - needs python-dotenv, which a given URL does not

            found = load()
            url, storage = found.broker.every_url.get_secret_value(), storage or found.storage
        self._line = ClientConnection(url, patience_s)
        self._endings = None if storage is None else Results(storage)
        self._pace = RetryAfter()
        self._inbox = Dispatcher(self._line, self._endings, self._pace.hear)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._line)
        self._stack.push_async_callback(self._inbox.close)
        if self._endings is not None:
            self._stack.push_async_callback(self._endings.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def submit(
        self,
        request: Mapping[str, object],
        *,
        priority: int = 0,
        correlation_id: str | None = None,
        reply_to: str | None = None,
        expiration_s: float | None = None,
    ) -> str:
        """Publish one request and wait for the broker's confirm. Returns its task id; hears nothing of the job.

        ``outlook``, right after it, says what it can expect.

        Args:
            request: a body as ACE-Step's ``POST /release_task`` takes it; gets a ``task_id`` when it has none.
            priority: 0 to 9; 9 goes first.
            correlation_id: comes back in the properties of every event.
            reply_to: a queue that gets the terminal event as well.
            expiration_s: seconds that the request may wait in the queue.

        Raises:
            InvalidTaskId: the request's ``task_id`` is none; nothing was sent.
            QueueFull: the broker refused it; ``retry_after`` says when to try again.
            NoQueue: no worker has declared the queues yet.
            Unreachable: the connection was lost; whether the request was taken may be unknown, and sending the same
                task id again is safe.
        """
        task_id = _id_of(request)
        message = aio_pika.Message(
            json.dumps({**request, "task_id": task_id}).encode(),
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=task_id,
            correlation_id=correlation_id,
            reply_to=reply_to,
            priority=priority,
            expiration=expiration_s,
            timestamp=datetime.now(UTC),
        )
        try:
            await self._line.publish(REQUESTS, ROUTING_KEY, message)
        except Unroutable as fault:
            raise NoQueue(f"no queue takes requests yet; {NOT_DECLARED}") from fault
        except Nacked as fault:
            raise await self._queue_full() from fault
        return task_id

    async def outlook(self, within_s: float = 2.0) -> QueueEstimate:
        """Say what a request that was submitted just now can expect: its place, and the seconds until its songs.

        Never an error, and apart from ``submit``: it asks the broker how many wait and each worker what it has in hand
        and how long its latest jobs took, and returns as soon as all have answered. That is a few milliseconds; a
        worker answers once a second at most, so do not ask for each request of a thousand. A login that may not hear
        or ask the workers gets ``position`` alone.

        A job's turn comes when the jobs in hand and those before it have left room; then it takes as long as jobs do.
        Left out is what nobody can know: priorities (whoever has a higher one goes first, whenever it comes), that
        requests differ in length and songs, which workers come and go, and whether workers that were half empty lately
        are as quick when they are full.

        Args:
            within_s: after this many seconds it is said without those who have not answered.
        """
        depth: RequestQueueDepth | None = None
        answers: dict[str, Worker] = {}
        trouble = None
        try:
            async with asyncio.timeout(within_s):
                ready, consumers = await self._line.depth(GENERATE)
                depth = RequestQueueDepth(ready=ready, consumers=consumers)
                await muster(self._line, answers, consumers, self._pace.hear)
        except TimeoutError:
            pass  # what was not said in time is missing below
        except BrokerError as fault:
            # The refusal's own text says what a worker's login needs, which is more than this one should get.
            may_not = depth is not None and isinstance(fault, BrokerRefused)
            trouble = MAY_NOT_ASK if may_not else describe(fault)
        return outlook_of(depth, tuple(answers.values()), self._pace.job_s, trouble)

    async def start(
        self,
        request: Mapping[str, object],
        *,
        priority: int = 0,
        correlation_id: str | None = None,
        expiration_s: float | None = None,
    ) -> JobHandle:
        """Publish one request as ``submit`` does, and listen to its job from before that: no event is missed."""
        task_id = _id_of(request)
        job = JobHandle(task_id, self, since=datetime.now(UTC))
        await self._inbox.follow(job)
        try:
            await self.submit(
                {**request, "task_id": task_id},
                priority=priority,
                correlation_id=correlation_id,
                expiration_s=expiration_s,
            )
        except BaseException:
            await self._inbox.leave(job)
            raise
        return job

    async def job(self, task_id: str) -> JobHandle:
        """Listen to a job that somebody submitted, now or long ago. An end that came before is found in storage."""
        job = JobHandle(_checked(task_id), self)
        await self._inbox.follow(job)
        self._inbox.look(job)
        return job

    async def wait(self, task_id: str, timeout_s: float | None = None) -> TerminalEvent:
        """Return the terminal event of a job, also when it ended before this call.

        Raises:
            NotEndedYet: it has not ended within ``timeout_s`` seconds; it goes on.
        """
        job = await self.job(task_id)
        try:
            return await job.wait(timeout_s)
        finally:
            await self._inbox.leave(job)

    async def cancel(self, task_id: str) -> None:
        """Ask for a job to stop, waiting or running; ``wait`` tells how it ended. Returns at the broker's confirm.

        Raises:
            NoQueue: nobody is there to hear it.
        """
        message = aio_pika.Message(
            b"",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=uuid4().hex,
            timestamp=datetime.now(UTC),
        )
        try:
            await self._line.publish(CONTROL, f"cancel.{_checked(task_id)}", message)
        except (Unroutable, Nacked) as fault:
            raise NoQueue(f"no worker hears that {task_id} is to stop; {NOT_DECLARED}") from fault

    async def call_roll(self) -> None:
        """Ask every worker to announce itself; ``stream("worker.#")`` hears the answers, if there are any.

        Raises:
            Unreachable: the connection was lost, or this login may not ask.
            NoQueue: nothing is declared yet.
        """
        with as_client_error("the workers were not asked"):
            await self._line.ask(CONTROL, QUESTION)

    async def result(self, event_or_id: TerminalEvent | str, folder: Path | str) -> tuple[Path, ...]:
        """Download a job's songs to ``folder`` and compare size and SHA-256. Returns the files, in the songs' order.

        Files appear whole or not at all; ones that are there already are left alone, and an interrupted download goes
        on where it stopped.

        Args:
            event_or_id: the terminal event, or the id of a job (this waits for its end).
            folder: made when missing.

        Raises:
            NoSongs: the job ended without any.
            DownloadFailed: a song cannot be had, or is not what the event describes.
        """
        event = await self.wait(event_or_id) if isinstance(event_or_id, str) else event_or_id
        if not isinstance(event, JobCompleted) or not event.data.audios:
            raise NoSongs(event)
        from acestep_consumer.client.download import download  # noqa: PLC0415 - an HTTP client, which many programs never need

        return await download(event.data, Path(folder), self._link)

    @asynccontextmanager
    async def subscribe(self, *routing_keys: str) -> AsyncIterator[AsyncIterator[JobEvent | WorkerEvent]]:
        """Hear events whose routing key matches, from now on: ``job.#`` all jobs, ``worker.#`` workers; none: both.

        What is submitted inside the block is heard. Raises ``NoQueue`` when nothing is declared yet.
        """
        async with Subscription(self._line, routing_keys or EVERYTHING, listener=self._pace.hear) as events:
            yield events

    async def stream(self, *routing_keys: str) -> AsyncGenerator[JobEvent | WorkerEvent, None]:
        """Yield events as ``subscribe`` does, from the first step of the loop on: ``async for`` in one line."""
        async with self.subscribe(*routing_keys) as events:
            async for event in events:
                yield event

    async def _queue_full(self) -> QueueFull:
        waiting = workers = None
        with suppress(BrokerError):  # this login may be allowed to publish alone
            waiting, workers = await self._line.depth(GENERATE)
        return QueueFull(self._pace.retry_after(workers), waiting, workers)

    async def _link(self, audio: Audio) -> str:
        """Our own keys make a fresh link; the event's may have expired."""
        if self._endings is not None:
            try:
                return await self._endings.link(audio.uri)
            except DownloadFailed:
                if audio.url is None:
                    raise
        if audio.url is None:
            raise DownloadFailed(
                f"{audio.uri}: this client has no access to storage and the event has no URL; give Client its storage, "
                "or set ACESTEP_S3_PRESIGN_SECONDS for the workers"
            )
        return audio.url


def _id_of(request: Mapping[str, object]) -> str:
    return _checked(str(request.get("task_id") or uuid4()))


def _checked(task_id: str) -> str:
    """Return it. An id is part of routing keys: ``*`` or a dot in it would hear of other jobs, or of none for ever."""
    if not _TASK_ID.fullmatch(task_id):
        raise InvalidTaskId(task_id)
    return task_id
