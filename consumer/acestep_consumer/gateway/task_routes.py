# SPDX-License-Identifier: Apache-2.0
"""``/release_task`` and ``/query_result``, and cancelling."""

import asyncio
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from acestep_consumer.gateway.answers import ApiError, envelope
from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.gateway.bodies import MULTIPART, fields_of, read_body, read_fields
from acestep_consumer.gateway.broker_session import BrokerSession
from acestep_consumer.gateway.submission import Submission, TaskOrder
from acestep_consumer.gateway.task_items import TaskView, unknown_entry
from acestep_consumer.gateway.tasks import TaskStates
from acestep_consumer.gateway.uploads import UploadSpool
from acestep_schemas.request import is_task_id
from acestep_schemas.strict_json import JsonRefused, loads

MAX_IDS: Final = 100
"""Ids whose storage is looked at in one request; of further ones the state in memory is given."""

LONGEST_WAIT_S: Final = 60.0
_QUERY_BYTES: Final = 1 << 20


class TaskRoutes:
    """Routes around tasks.

    Args:
        keys: checks keys.
        submission: publishes and cancels tasks.
        tasks: the states of tasks.
        session: knows the queue's length.
        spool: receives uploads.
        max_bytes: largest body without files.
    """

    def __init__(  # noqa: PLR0913 - what a task takes
        self,
        keys: ApiKeyCheck,
        submission: Submission,
        tasks: TaskStates,
        session: BrokerSession,
        spool: UploadSpool,
        *,
        max_bytes: int,
    ) -> None:
        self._keys = keys
        self._submission = submission
        self._tasks = tasks
        self._session = session
        self._spool = spool
        self._max_bytes = max_bytes

    async def release(self, request: web.Request) -> web.Response:
        """Accept a task."""
        media = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media == MULTIPART:
            return await self._release_form(request)
        body = await read_fields(request, self._max_bytes)
        owner = self._keys.by_body(request, body)
        return self._accepted(await self._submission.submit(TaskOrder.of(request, owner, body)))

    async def query(self, request: web.Request) -> web.Response:
        """Tell the states of tasks."""
        body = await self._query_fields(request)
        self._keys.by_body(request, body)
        ids = _ids_of(body.get("task_id_list"))
        await self._wait(ids, _seconds(body.get("wait", request.query.get("wait"))))
        views = await self._views(ids)
        entries = [unknown_entry(each) if (view := views.get(str(each))) is None else view.entry() for each in ids]
        # Ids are echoed as they came, also where a client sends numbers.
        return envelope([{**entry, "task_id": each} for each, entry in zip(ids, entries, strict=True)])

    async def cancel(self, request: web.Request) -> web.Response:
        """Cancel a task that the body names."""
        body = await read_fields(request, _QUERY_BYTES)
        self._keys.by_body(request, body)
        return await self._cancel(str(body.get("task_id", "")))

    async def delete(self, request: web.Request) -> web.Response:
        """Cancel the task of the path."""
        self._keys.by_header(request)
        return await self._cancel(request.match_info["task_id"])

    async def _release_form(self, request: web.Request) -> web.Response:
        stranger = self._keys.required and "Authorization" not in request.headers
        if not stranger:
            # Before the body: a wrong key must not cost an upload.
            self._keys.by_header(request)
        async with self._spool.receive(request, self._keys.is_key if stranger else None) as form:
            owner = self._keys.by_body(request, form.fields)
            order = TaskOrder.of(request, owner, form.fields, files=form.files)
            return self._accepted(await self._submission.submit(order))

    def _accepted(self, view: TaskView) -> web.Response:
        position = max(1, self._session.queue_size)
        return envelope({"task_id": view.task_id, "status": view.stage, "queue_position": position})

    async def _query_fields(self, request: web.Request) -> Mapping[str, object]:
        media = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media == MULTIPART:
            async with self._spool.receive(request, self._keys.is_key if self._keys.required else None) as form:
                return form.fields
        body = await read_body(request, _QUERY_BYTES)
        return fields_of(body, request.headers.get("Content-Type", "")) if body.strip() else {}

    async def _views(self, ids: list[Any]) -> dict[str, TaskView | None]:
        names = list(dict.fromkeys(str(each) for each in ids if is_task_id(str(each))))
        views = await self._tasks.find_all(names[:MAX_IDS])
        return views | {name: self._tasks.known(name) for name in names[MAX_IDS:]}

    async def _wait(self, ids: list[Any], within_s: float) -> None:
        """Wait until one of these tasks has ended that had not, or none is left to wait for."""
        deadline = time.monotonic() + within_s
        if within_s <= 0:
            return
        views = await self._views(ids)
        going_on = {name for name, view in views.items() if view is not None and not view.ended}
        while going_on and (left_s := deadline - time.monotonic()) > 0:
            await self._tasks.wait_for_news(going_on, left_s)
            if any(view is not None and view.ended for view in map(self._tasks.known, going_on)):
                return
            # Progress comes twice a second for each task: one turn of the loop for all of it.
            await asyncio.sleep(0)

    async def _cancel(self, task_id: str) -> web.Response:
        if not is_task_id(task_id) or (view := await self._tasks.find(task_id)) is None:
            raise ApiError(HTTPStatus.NOT_FOUND, "there is no such task")
        if view.ended:
            return envelope({"task_id": task_id, "status": view.stage})
        await self._submission.cancel(task_id)
        return envelope({"task_id": task_id, "status": "cancelling"})


def _ids_of(value: object) -> list[Any]:
    """Return the ids of a list, or of the JSON text of one; none where it is neither. Raises ``ApiError`` (400)."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and value[0].startswith("["):
        value = value[0]  # a form's field that was given as a list of one text
    if isinstance(value, str):
        try:
            value = loads(value).value
        except JsonRefused:
            return []
    if value is None:
        return []
    if not isinstance(value, list):
        raise ApiError(HTTPStatus.BAD_REQUEST, "task_id_list must be a list, or JSON text of one")
    return value


def _seconds(value: object) -> float:
    try:
        return min(max(float(str(value or 0)), 0.0), LONGEST_WAIT_S)
    except ValueError:
        return 0.0
