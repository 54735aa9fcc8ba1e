# SPDX-License-Identifier: Apache-2.0
"""Results in storage: reads how a job ended, and its songs. Connects at the first call."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from pydantic import ValidationError

from acestep_consumer.client.errors import DownloadFailed
from acestep_consumer.domain.errors import StorageUnavailable
from acestep_consumer.domain.objects import MANIFEST, ByteRange, ObjectAddress, object_key
from acestep_consumer.domain.ports import Objects, ObjectStream
from acestep_consumer.storage.adapter import open_objects
from acestep_schemas.events import Completed, JobCompleted, TerminalEvent, parse_manifest, unfinished_event

if TYPE_CHECKING:
    from acestep_consumer.config.settings import StorageSettings
    from acestep_consumer.storage.lineage import Family


class Results:
    """The results that workers stored in the bucket of ``settings``. Needs keys that may read.

    ``retry_s``: how long a storage that gives no answer is asked again, and how long each time it may say nothing.
    """

    def __init__(self, settings: "StorageSettings", *, retry_s: float = 30) -> None:
        self._settings = settings
        self._retry_s = retry_s
        self._objects: Objects | None = None
        self._stack = AsyncExitStack()
        self._connecting = asyncio.Lock()

    async def find(self, task_id: str) -> TerminalEvent | None:
        """Return the terminal event of a job as its worker published it; None: it has not ended.

        Raises:
            DownloadFailed: the storage is unreachable or refuses, or the manifest is unreadable, or another job's.
        """
        try:
            address = ObjectAddress(self._settings.bucket, object_key(self._settings.prefix, task_id, MANIFEST))
            found = await (await self.objects()).get(address)
        except (ValueError, StorageUnavailable) as error:
            raise DownloadFailed(str(error)) from error
        return None if found is None else _event(address, task_id, found.body)

    async def family(self, task_id: str) -> "Family":
        """Return a task's ancestors and descendants, itself among them.

        Raises:
            DownloadFailed: as for ``find``.
        """
        # structlog, which no producer needs.
        from acestep_consumer.storage.lineage import family_of  # noqa: PLC0415
        from acestep_consumer.storage.results import ResultStore  # noqa: PLC0415

        try:
            return await family_of(task_id, ResultStore(await self.objects(), self._settings))
        except (ValueError, StorageUnavailable) as error:
            raise DownloadFailed(str(error)) from error

    @asynccontextmanager
    async def open(self, uri: str, span: ByteRange | None = None) -> AsyncIterator[ObjectStream]:
        """Open a song for reading, or ``span`` of it. Raises ``StorageUnavailable``, ``StorageRefused`` here."""
        objects = await self.objects()
        async with objects.open(ObjectAddress.of(uri), span) as stream:
            yield stream

    async def close(self) -> None:
        """Close connections."""
        await self._stack.aclose()

    async def objects(self) -> Objects:
        """Return the storage itself, connected."""
        async with self._connecting:
            if self._objects is None:
                opening = open_objects(self._settings, retry_s=self._retry_s, read_s=self._retry_s)
                self._objects = await self._stack.enter_async_context(opening)
            return self._objects


def _event(address: ObjectAddress, task_id: str, body: bytes) -> TerminalEvent:
    try:
        data = parse_manifest(body)
    except ValidationError as error:
        raise DownloadFailed(
            f"{address} is not a manifest that can be read; is this package too old for it?"
        ) from error
    if data.task_id != task_id:
        raise DownloadFailed(f"{address} is the manifest of another job, {data.task_id}")
    return JobCompleted.of(data) if isinstance(data, Completed) else unfinished_event(data)
