# SPDX-License-Identifier: Apache-2.0
"""Chooses the adapter of ``ports.Objects``. Another storage is a folder beside ``s3``, chosen here."""

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from acestep_consumer.domain.ports import Objects

if TYPE_CHECKING:
    from acestep_consumer.config.settings import StorageSettings


def open_objects(
    settings: "StorageSettings", *, retry_s: float, read_s: float | None = None
) -> AbstractAsyncContextManager[Objects]:
    """Return the object storage of ``settings``.

    ``retry_s``: how long one that gives no answer is asked again; ``read_s``: how long each time it may say nothing,
    None: half a minute.
    """
    from acestep_consumer.storage.s3.objects import S3Objects  # noqa: PLC0415 - boto3: half a second, and no producer needs it

    return S3Objects(settings, retry_s=retry_s, read_s=read_s)
