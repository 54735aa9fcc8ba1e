# SPDX-License-Identifier: Apache-2.0
"""Publishes requests as tasks, and waits for tasks whose answer an HTTP request is waiting for."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import structlog
from aiohttp import web

from acestep_consumer.client.errors import ClientError, NoQueue, QueueFull
from acestep_consumer.client.uploads import SpooledFile, UploadStore
from acestep_consumer.domain.errors import StorageRefused, StorageUnavailable
from acestep_consumer.gateway.answers import ApiError, busy
from acestep_consumer.gateway.broker_session import BrokerSession
from acestep_consumer.gateway.messages import MessageBuilder, idempotency_key, request_fields
from acestep_consumer.gateway.rate_limit import RateLimit
from acestep_consumer.gateway.spans import traceparent_of
from acestep_consumer.gateway.task_ids import new_task_id, task_id_of
from acestep_consumer.gateway.task_items import TaskView
from acestep_consumer.gateway.tasks import TaskStates
from acestep_consumer.observability.tracing import publish_span

AWAITED_PRIORITY: Final = 9
"""Of tasks for which somebody waits at an open connection."""

IDEMPOTENCY_KEY: Final = "Idempotency-Key"
QUEUE_FULL: Final = "Server busy: queue is full"

_RETRY_S: Final = 5.0
_KEY_LENGTH: Final = 255

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOrder:
    """A request for a task.

    Attributes:
        owner: who sent it, as ``ApiKeyCheck`` names them.
        body: the request's fields.
        files: uploaded files, by the field that each replaces.
        idempotency_key: the client's own name for it; the same name is the same task. None: each request is another.
        traceparent: the trace that it belongs to.
        priority: 0 to 9.
    """

    owner: str
    body: Mapping[str, object]
    files: Mapping[str, SpooledFile] = field(default_factory=dict)
    idempotency_key: str | None = None
    traceparent: str | None = None
    priority: int = 0

    @classmethod
    def of(
        cls,
        request: web.Request,
        owner: str,
        body: Mapping[str, object],
        *,
        files: Mapping[str, SpooledFile] | None = None,
        priority: int = 0,
    ) -> "TaskOrder":
        """Take what the request's headers say. Raises ``ApiError`` (400)."""
        key = request.headers.get(IDEMPOTENCY_KEY) or idempotency_key(body)
        if key is not None and len(key) > _KEY_LENGTH:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"{IDEMPOTENCY_KEY} has more than {_KEY_LENGTH} characters")
        return cls(
            owner=owner,
            body=body,
            files=files or {},
            idempotency_key=key,
            traceparent=traceparent_of(request),
            priority=priority,
        )


class Submission:
    """Publishes tasks.

    Args:
        session: publishes messages.
        tasks: the states of tasks.
        builder: builds messages.
        uploads: stores files.
        rate_limit: refuses tasks of a key that asks for too many.
        max_bytes: largest message.
    """

    def __init__(  # noqa: PLR0913 - the way of a task, from its body to the queue
        self,
        session: BrokerSession,
        tasks: TaskStates,
        builder: MessageBuilder,
        uploads: UploadStore,
        *,
        rate_limit: RateLimit,
        max_bytes: int,
    ) -> None:
        self._session = session
        self._tasks = tasks
        self._builder = builder
        self._uploads = uploads
        self._rate_limit = rate_limit
        self._max_bytes = max_bytes

    async def submit(self, order: TaskOrder) -> TaskView:
        """Publish a task and wait for the broker's confirm.

        Raises:
            ApiError: 400 for a request that cannot be made, 413 for one that is too large, 429 where the queue is full
                or the key asks for too many, 503 where broker or storage are out of reach.
        """
        fields = request_fields(order.body)
        task_id = new_task_id() if order.idempotency_key is None else task_id_of(order.owner, order.idempotency_key)
        if order.idempotency_key is not None and (known := await self._accepted(task_id)) is not None:
            return known
        self._rate_limit.admit(order.owner)
        addresses = self._uploads.addresses(task_id, order.files)
        message = await self._builder.build(task_id, fields, addresses)
        self._require_size(message)
        await self._store(task_id, order.files)
        await self._publish(task_id, message, order, addresses)
        log.info("task accepted", task_id=task_id, key=order.owner, uploads=len(addresses))
        return self._tasks.known(task_id) or TaskView(task_id=task_id, created=int(time.time()))

    async def run(self, order: TaskOrder, within_s: float) -> TaskView:
        """Publish a task, wait for its end, and return it. A task that nobody waits for any more is cancelled.

        Raises:
            ApiError: as for ``submit``; 504 where it has not ended in time.
        """
        view = await self.submit(order)
        return await self.wait(view, within_s)

    async def wait(self, view: TaskView, within_s: float) -> TaskView:
        """Wait for the end of a task; cancel it where that does not come in time, or the caller goes.

        Raises ``ApiError`` (504).
        """
        ended = None
        try:
            ended = await self._end_of(view, within_s)
        finally:
            if ended is None:
                await self._stop(view.task_id)
        if ended is None:
            text = f"the task did not end within {within_s:g} s and was cancelled"
            raise busy(HTTPStatus.GATEWAY_TIMEOUT, text, _RETRY_S)
        return ended

    async def cancel(self, task_id: str) -> None:
        """Ask for a task to stop. Raises ``ApiError`` (503)."""
        try:
            await self._session.cancel(task_id)
        except ClientError as error:
            raise _unavailable("not cancelled") from error

    async def _accepted(self, task_id: str) -> TaskView | None:
        """Return a task that was accepted under the same idempotency key before, as far as this replica can tell."""
        view = self._tasks.known(task_id)
        if view is None:
            found = await self._tasks.find(task_id)
            view = found if found is not None and found.ended else None
        return view

    async def _end_of(self, view: TaskView, within_s: float) -> TaskView | None:
        deadline = time.monotonic() + within_s
        while not view.ended:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            await self._tasks.wait_for_news((view.task_id,), left_s)
            view = await self._tasks.find(view.task_id) or view
        return view

    async def _stop(self, task_id: str) -> None:
        with suppress(ClientError):
            await self._session.cancel(task_id)

    async def _store(self, task_id: str, files: Mapping[str, SpooledFile]) -> None:
        try:
            await self._uploads.put(task_id, files)
        except StorageRefused as error:
            log.warning("upload not stored", task_id=task_id, reason=str(error))
            text = "the storage refuses uploads: this server's keys may not write them"
            raise busy(HTTPStatus.SERVICE_UNAVAILABLE, text, _RETRY_S) from None
        except StorageUnavailable:
            text = "the upload cannot be stored now: the storage does not answer"
            raise busy(HTTPStatus.SERVICE_UNAVAILABLE, text, _RETRY_S) from None

    async def _publish(
        self, task_id: str, message: Mapping[str, Any], order: TaskOrder, addresses: Mapping[str, str]
    ) -> None:
        self._tasks.accept(task_id)
        try:
            with publish_span(task_id, order.traceparent) as traceparent:
                await self._session.submit(message, priority=order.priority, traceparent=traceparent)
        except (QueueFull, NoQueue) as error:
            self._tasks.forget(task_id)
            await self._uploads.delete(addresses)
            if isinstance(error, QueueFull):
                raise busy(HTTPStatus.TOO_MANY_REQUESTS, QUEUE_FULL, error.retry_after) from error
            raise _unavailable("no worker has been here yet") from error
        except ClientError as error:
            # Whether it was taken may be unknown, so that its uploads stay.
            self._tasks.forget(task_id)
            log.warning("task not confirmed", task_id=task_id, reason=str(error))
            raise _unavailable(f"try again, with the same {IDEMPOTENCY_KEY} to be safe from a second task") from error

    def _require_size(self, message: Mapping[str, Any]) -> None:
        if len(json.dumps(message)) > self._max_bytes:
            text = f"the request has more than {self._max_bytes:,} bytes (ACESTEP_MAX_MESSAGE_BYTES)"
            raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)


def _unavailable(what: str) -> ApiError:
    return busy(HTTPStatus.SERVICE_UNAVAILABLE, f"the queue is out of reach: {what}", _RETRY_S)
