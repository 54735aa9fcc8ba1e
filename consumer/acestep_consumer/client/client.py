# SPDX-License-Identifier: Apache-2.0
"""The client: submits requests, follows and cancels jobs, downloads songs, subscribes to events."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypedDict, Unpack
from uuid import uuid4

import aio_pika

from acestep_consumer.broker.errors import BrokerError, BrokerRefused, Nacked, Unroutable, describe
from acestep_consumer.broker.topology import CONTROL, EVENTS, GENERATE, NOTICES, REQUESTS
from acestep_consumer.client.connection import NOT_DECLARED, ClientConnection, as_client_error
from acestep_consumer.client.dispatcher import Dispatcher
from acestep_consumer.client.errors import (
    ClientError,
    DownloadFailed,
    InvalidTaskId,
    NoQueue,
    QueueFull,
    Unreachable,
    no_songs,
)
from acestep_consumer.client.estimate import QueueEstimate, RequestQueueDepth, RetryAfter, estimate
from acestep_consumer.client.job import JobHandle
from acestep_consumer.client.results import Results
from acestep_consumer.client.subscription import Subscription
from acestep_consumer.client.worker_survey import STATUS_REQUEST, survey_workers
from acestep_consumer.domain.objects import is_task_id
from acestep_schemas.events import JobCompleted, JobEvent, TerminalEvent, Worker, WorkerEvent
from acestep_schemas.request_body import RequestBody

if TYPE_CHECKING:
    from acestep_consumer.config.settings import StorageSettings
    from acestep_consumer.storage.lineage import Family

ROUTING_KEY: Final = "generate"
MAY_NOT_ASK: Final = f"this login may not read {EVENTS}, or not publish `{STATUS_REQUEST}` to {CONTROL}"
MAY_NOT_SEE: Final = f"this login may not see {GENERATE}; from RabbitMQ 4 on that takes a permission on it"
EVERYTHING: Final = ("job.#", "worker.#")
# Publishes of `submit_many` that wait for their confirm at the same time.
_IN_FLIGHT: Final = 100
_SURVEY_TIMEOUT_S: Final = 2.0

AnyRequest = RequestBody | Mapping[str, object]
"""A body as ACE-Step's ``POST /release_task`` takes it. Annotate one as ``RequestBody``, and its fields are checked."""


class RequestOptions(TypedDict, total=False):
    """The AMQP properties of a request."""

    priority: int
    """0 (the default) to 9; 9 goes first."""
    correlation_id: str | None
    """Comes back in the properties of every event."""
    reply_to: str | None
    """A queue that gets the terminal event as well."""
    expiration_s: float | None
    """Seconds that the request may wait in the queue."""
    traceparent: str | None
    """W3C Trace Context: the job becomes a part of this trace."""


class Client:
    """A connection for producers and subscribers; an async context manager. A lost connection is re-established.

    Args:
        url: the broker, ``amqp://`` or ``amqps://``; of a cluster, its nodes' URLs, comma-separated. None: broker and
            storage are read from the environment and ``.env`` (``ACESTEP_AMQP_URL``, ``ACESTEP_S3_…``); boto3
            finds the keys of S3 as it always does.
        storage: where results are stored. Without it, downloads need presigned URLs in the events, and a job that ended
            before this client followed it looks the same as one that waits.
        patience_s: seconds that a publish is retried over lost connections.
    """

    def __init__(
        self, url: str | None = None, *, storage: "StorageSettings | None" = None, patience_s: float = 30.0
    ) -> None:
        if url is None:
            from acestep_consumer.config.settings import load  # noqa: PLC0415 - python-dotenv, which only this needs

            found = load()
            url, storage = found.broker.every_url.get_secret_value(), storage or found.storage
        self._connection = ClientConnection(url, patience_s)
        self._results = None if storage is None else Results(storage)
        self._retry_after = RetryAfter()
        self._dispatcher = Dispatcher(self._connection, self._results, self._retry_after.learn)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._connection)
        self._stack.push_async_callback(self._dispatcher.close)
        if self._results is not None:
            self._stack.push_async_callback(self._results.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def submit(self, request: AnyRequest, **options: Unpack[RequestOptions]) -> str:
        """Publish one request and wait for the broker's confirm. Returns its task id; does not follow the job.

        ``outlook``, right after it, estimates the waiting time.

        Args:
            request: a body as ACE-Step's ``POST /release_task`` takes it; gets a ``task_id`` when it has none.
            options: ``priority`` (0 to 9; 9 goes first), ``correlation_id`` (comes back in the properties of every
                event), ``reply_to`` (a queue that gets the terminal event as well), ``expiration_s`` (seconds that the
                request may wait in the queue), ``traceparent`` (W3C Trace Context: the trace that the job is part of).

        Raises:
            InvalidTaskId: the request's ``task_id`` is malformed; nothing was sent.
            QueueFull: the broker refused the request; ``retry_after`` says when to try again.
            NoQueue: the queues are not declared yet.
            Unreachable: the connection was lost; whether the request was accepted may be unknown, and sending the same
                task id again is safe.
        """
        encoded = _encoded(request)
        try:
            await self._publish_request(encoded, **options)
        except Nacked as fault:
            raise await self._queue_full() from fault
        return encoded.task_id

    async def submit_many(self, requests: Iterable[AnyRequest], **options: Unpack[RequestOptions]) -> tuple[str, ...]:
        """Publish several requests, many at a time, and wait for the confirms. Returns the task ids in their order.

        It stops at the first error. The error's ``accepted`` then has, for each request in turn, the task id or None:
        go on with those that have None. Give requests task ids of your own if one may be sent again after
        ``Unreachable``: with the same id that is safe.

        Args:
            requests: bodies as ``submit`` takes them.
            options: as for ``submit``; they hold for all requests.

        Raises:
            InvalidTaskId: a request's ``task_id`` is malformed; nothing was sent.
            ClientError: as for ``submit``.
        """
        encoded = [_encoded(request) for request in requests]
        accepted: list[str | None] = [None] * len(encoded)
        faults: list[Nacked | ClientError] = []
        remaining = iter(enumerate(encoded))

        async def publish() -> None:
            for index, each in remaining:
                try:
                    await self._publish_request(each, **options)
                except (Nacked, ClientError) as fault:
                    faults.append(fault)
                else:
                    accepted[index] = each.task_id
                if faults:
                    return

        await asyncio.gather(*(publish() for _ in range(min(_IN_FLIGHT, len(encoded)))))
        if faults:
            first = faults[0]
            error = first if isinstance(first, ClientError) else await self._queue_full()
            error.accepted = tuple(accepted)
            raise error from (first.__cause__ if error is first else first)
        return tuple(each.task_id for each in encoded)

    async def outlook(self, within_s: float = _SURVEY_TIMEOUT_S) -> QueueEstimate:
        """Estimate place and waiting time of a request that was submitted just now.

        Never an error, and apart from ``submit``: it asks the broker how many requests wait, and each worker how many
        jobs it runs, how long those still take, and how long its latest ones took. It returns as soon as all have
        answered, which takes a few milliseconds; a worker answers once a second at most, so do not ask for each request
        of a thousand. A login that may not ask the workers or read their answers gets ``position`` alone.

        A job's turn comes when the running jobs and those before it have left room; then it takes as long as jobs do.
        Priorities are left out (a request with a higher one goes first whenever it comes), and so are differences in
        length and number of songs, workers that come and go, and that a worker gets slower when it is full.

        Args:
            within_s: after this many seconds, workers that have not answered are left out.
        """
        depth, answers, problem = await self._survey(within_s)
        return estimate(depth, answers, self._retry_after.job_s, problem)

    async def start(self, request: AnyRequest, **options: Unpack[RequestOptions]) -> JobHandle:
        """Publish one request as ``submit`` does, and follow its job from before that: no event is missed."""
        task_id = _id_of(request)
        job = JobHandle(task_id, self, since=datetime.now(UTC))
        await self._dispatcher.follow(job)
        try:
            await self.submit({**request, "task_id": task_id}, **options)
        except BaseException:
            await self._dispatcher.unfollow(job)
            raise
        return job

    async def job(self, task_id: str) -> JobHandle:
        """Follow a job that somebody submitted, now or long ago. An end that came before is found in storage."""
        job = JobHandle(_checked(task_id), self)
        await self._dispatcher.follow(job)
        self._dispatcher.look_up(job)
        return job

    async def wait(self, task_id: str, timeout_s: float | None = None) -> TerminalEvent:
        """Return the terminal event of a job, also when it ended before this call.

        Args:
            task_id: the job's id.
            timeout_s: seconds to wait. None: without a limit, but only as long as such a job can exist; see
                ``Job.wait``.

        Raises:
            NotEndedYet: the job goes on; or no such job is known.
        """
        job = await self.job(task_id)
        try:
            return await job.wait(timeout_s)
        finally:
            await self._dispatcher.unfollow(job)

    async def cancel(self, task_id: str) -> None:
        """Ask for a job to stop, waiting or running; ``wait`` tells how it ended. Returns at the broker's confirm.

        Raises:
            NoQueue: the queues are not declared yet.
        """
        message = aio_pika.Message(
            b"",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=uuid4().hex,
            timestamp=datetime.now(UTC),
        )
        try:
            await self._connection.publish(CONTROL, f"cancel.{_checked(task_id)}", message)
        except (Unroutable, Nacked) as fault:
            raise NoQueue(f"no queue takes the cancellation of {task_id}; {NOT_DECLARED}") from fault

    async def is_idle(self) -> bool:
        """Whether no request waits and no worker runs a job; False where that cannot be known."""
        depth, answers, _ = await self._survey(_SURVEY_TIMEOUT_S)
        busy = any(worker.in_hand for worker in answers)
        return depth is not None and not depth.ready and bool(answers) and not busy

    async def waiting(self) -> int | None:
        """Return how many requests wait in the queue; None where this login may not see that.

        Raises:
            NoQueue: the queues are not declared yet.
            Unreachable: the connection was lost.
        """
        try:
            with as_client_error("the queue was not asked"):
                ready, _ = await self._connection.depth(GENERATE)
        except Unreachable as error:
            if isinstance(error.__cause__, BrokerRefused):
                return None
            raise
        return ready

    async def request_statuses(self) -> None:
        """Ask every worker to announce itself; ``stream("worker.#")`` yields the answers, if there are any.

        Raises:
            Unreachable: the connection was lost, or this login may not ask.
            NoQueue: the queues are not declared yet.
        """
        with as_client_error("the workers were not asked"):
            await self._connection.publish_once(CONTROL, STATUS_REQUEST)

    async def result(self, event_or_id: TerminalEvent | str, folder: Path | str) -> tuple[Path, ...]:
        """Download a job's songs to ``folder`` and verify size and SHA-256. Returns the files, in the songs' order.

        Files appear whole or not at all. Those that are there already are left alone, and a download that failed is
        resumed; one that was cancelled begins again.

        Args:
            event_or_id: the terminal event, or the id of a job (this waits for its end).
            folder: made when missing.

        Raises:
            NoSongs: the job ended without songs; its subclasses say how.
            DownloadFailed: a song cannot be fetched, or is not the one that the event describes.
        """
        event = await self.wait(event_or_id) if isinstance(event_or_id, str) else event_or_id
        if not isinstance(event, JobCompleted) or not event.data.audios:
            raise no_songs(event)
        from acestep_consumer.client.download import download  # noqa: PLC0415 - an HTTP client, which many programs never need

        return await download(event.data, Path(folder), self._results)

    async def lineage(self, task_id: str) -> "Family":
        """Return the family of a job: what its songs were made from, and what was made from them.

        ``tasks`` are the manifests by task id, ``relations`` say who comes from whom, ``children_of`` who comes from
        one. The manifest is None of a job that was deleted, has not completed, or never was.

        Raises:
            DownloadFailed: this client has no storage, or it is unreachable or refuses.
        """
        if self._results is None:
            raise DownloadFailed("this client has no access to storage, which knows families: give Client its storage")
        return await self._results.family(_checked(task_id))

    @asynccontextmanager
    async def subscribe(self, *routing_keys: str) -> AsyncIterator[AsyncIterator[JobEvent | WorkerEvent]]:
        """Subscribe to events by routing key: ``job.#`` for all jobs, ``worker.#`` for workers; none: both.

        From the beginning of the block on, no event is missed. Raises ``NoQueue`` when the queues are not declared yet.
        """
        keys = routing_keys or EVERYTHING
        async with Subscription(self._connection, keys, listener=self._retry_after.learn) as events:
            yield events

    async def stream(self, *routing_keys: str) -> AsyncGenerator[JobEvent | WorkerEvent, None]:
        """Yield events as ``subscribe`` does, from the first step of the loop on: ``async for`` in one line."""
        async with self.subscribe(*routing_keys) as events:
            async for event in events:
                yield event

    async def _publish_request(  # noqa: PLR0913 - a message has these properties
        self,
        encoded: "_RequestMessage",
        *,
        priority: int = 0,
        correlation_id: str | None = None,
        reply_to: str | None = None,
        expiration_s: float | None = None,
        traceparent: str | None = None,
    ) -> None:
        """Publish a request. Raises ``Nacked`` where the queue is full, else ``ClientError``."""
        message = aio_pika.Message(
            encoded.body,
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=encoded.task_id,
            correlation_id=correlation_id,
            reply_to=reply_to,
            priority=priority,
            expiration=expiration_s,
            timestamp=datetime.now(UTC),
            headers={} if traceparent is None else {"traceparent": traceparent},
        )
        try:
            await self._connection.publish(REQUESTS, ROUTING_KEY, message)
        except Unroutable as fault:
            raise NoQueue(f"no queue takes requests yet; {NOT_DECLARED}") from fault

    async def _survey(self, within_s: float) -> tuple[RequestQueueDepth | None, tuple[Worker, ...], str | None]:
        """Return the queue's depth, the workers' answers, and why something could not be asked."""
        depth: RequestQueueDepth | None = None
        answers: dict[str, Worker] = {}
        problem = None
        try:
            async with asyncio.timeout(within_s):
                ready, consumers = await self._request_queue()
                depth = RequestQueueDepth(ready=ready, consumers=consumers)
                await survey_workers(self._connection, answers, consumers, self._retry_after.learn)
        except TimeoutError:
            pass  # the answers so far are what there is
        except BrokerError as fault:
            # The refusal's own text says what a worker's login needs, which is more than this one should get.
            problem = describe(fault)
            if isinstance(fault, BrokerRefused):
                problem = MAY_NOT_SEE if depth is None else MAY_NOT_ASK
        return depth, tuple(answers.values()), problem

    async def _request_queue(self) -> tuple[int, int]:
        """Return how many requests wait, and the consumers of their queue. Raises ``BrokerError``.

        A worker that has all it can hold of another queue consumes none of this one. If all are so, the consumers of
        the dead-letter notices count, of which every worker is one.
        """
        ready, consumers = await self._connection.depth(GENERATE)
        if not consumers:
            with suppress(BrokerError):
                _, consumers = await self._connection.depth(NOTICES)
        return ready, consumers

    async def _queue_full(self) -> QueueFull:
        waiting = workers = None
        with suppress(BrokerError):  # this login may be allowed to publish alone
            waiting, workers = await self._request_queue()
        return QueueFull(self._retry_after.retry_after(workers), waiting, workers)


@dataclass(frozen=True, slots=True)
class _RequestMessage:
    """A request as it is sent: JSON that holds the task id."""

    task_id: str
    body: bytes


def _encoded(request: AnyRequest) -> _RequestMessage:
    task_id = _id_of(request)
    return _RequestMessage(task_id, json.dumps({**request, "task_id": task_id}).encode())


def _id_of(request: AnyRequest) -> str:
    return _checked(str(request.get("task_id") or uuid4()))


def _checked(task_id: str) -> str:
    """Return it. An id is part of routing keys: with ``*`` or a dot it would match other jobs' events, or none."""
    if not is_task_id(task_id):
        raise InvalidTaskId(task_id)
    return task_id
