# SPDX-License-Identifier: Apache-2.0
"""Results in S3: reads how a job ended, and signs URLs of its songs. Connects at the first call."""

import asyncio
import re
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field, TypeAdapter, ValidationError

from acestep_consumer.client.errors import DownloadFailed
from acestep_consumer.domain.errors import StorageUnavailable
from acestep_schemas.events import Completed, JobCompleted, TerminalEvent, Unfinished, unfinished_event
from acestep_schemas.request import TASK_ID_PATTERN

if TYPE_CHECKING:
    from acestep_consumer.config.settings import StorageSettings
    from acestep_consumer.storage.objects import Objects
    from acestep_consumer.storage.s3_client import ObjectAddress

MANIFEST: Final = "manifest.json"
# Long enough for one download over a slow connection; a longer one gets another URL on the way.
URL_LIFETIME_S: Final = 3600

_MANIFEST: Final[TypeAdapter[Completed | Unfinished]] = TypeAdapter(
    Annotated[Completed | Unfinished, Field(discriminator="status")]
)
_TASK_ID: Final = re.compile(TASK_ID_PATTERN)


class Results:
    """The result bucket of ``settings``. Needs keys that may read; each call raises ``DownloadFailed``."""

    def __init__(self, settings: "StorageSettings") -> None:
        self._settings = settings
        self._objects: Objects | None = None
        self._stack = AsyncExitStack()
        self._connecting = asyncio.Lock()

    async def find(self, task_id: str) -> TerminalEvent | None:
        """Return the terminal event of a job that has ended, as its worker published it; None: it has not ended."""
        if not _TASK_ID.fullmatch(task_id):
            raise DownloadFailed(f"{task_id[:128]!r} is not a task id")
        key = "/".join(part for part in (self._settings.prefix.strip("/"), task_id, MANIFEST) if part)
        address = _address(self._settings.bucket, key)
        try:
            body = await (await self._connected()).read(address)
        except StorageUnavailable as error:
            raise DownloadFailed(str(error)) from error
        return None if body is None else _event(address, body)

    async def link(self, uri: str) -> str:
        """Return a URL from which ``s3://bucket/key`` can be read for an hour."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        try:
            return await (await self._connected()).presign(_address(bucket, key), URL_LIFETIME_S)
        except StorageUnavailable as error:
            raise DownloadFailed(str(error)) from error

    async def close(self) -> None:
        """Close connections."""
        await self._stack.aclose()

    async def _connected(self) -> "Objects":
        from acestep_consumer.storage.objects import Objects  # noqa: PLC0415 - boto3: half a second, and no producer needs it
        from acestep_consumer.storage.s3_client import S3Connection  # noqa: PLC0415 - as above

        async with self._connecting:
            if self._objects is None:
                self._objects = Objects(await self._stack.enter_async_context(S3Connection(self._settings)))
            return self._objects


def _address(bucket: str, key: str) -> "ObjectAddress":
    from acestep_consumer.storage.s3_client import ObjectAddress  # noqa: PLC0415 - see above

    return ObjectAddress(bucket, key)


def _event(address: "ObjectAddress", body: bytes) -> TerminalEvent:
    try:
        data = _MANIFEST.validate_json(body, extra="ignore")
    except ValidationError as error:
        raise DownloadFailed(
            f"{address} is not a manifest that can be read; is this package too old for it?"
        ) from error
    return JobCompleted.of(data) if isinstance(data, Completed) else unfinished_event(data)
