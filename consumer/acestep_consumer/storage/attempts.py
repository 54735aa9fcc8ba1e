# SPDX-License-Identifier: Apache-2.0
"""How often a message was tried, and how many of these tries ended without a word.

A broker tells little: a classic queue only that there was a try before, a quorum queue counts hand-backs too. So the
worker keeps a ledger beside the songs, ``<prefix>/<task_id>/attempts/<message>-<number>.json``, one small object a try.
It costs nothing as long as all goes well: the first try of a message is not written down. A message that comes again
was tried once before, at least. Who hands a message back in good order excuses the try. What is not excused ended with
the death of its worker, and the message may have been the cause.
"""

import hashlib
import json
from dataclasses import replace
from itertools import count
from typing import Final

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.job import Attempt
from acestep_consumer.storage.objects import ObjectContent, Objects
from acestep_consumer.storage.results import object_key
from acestep_consumer.storage.s3_client import ObjectAddress

_BEGUN: Final = {"state": "begun"}
_EXCUSED: Final = {"state": "excused"}


class S3AttemptStore:
    """``ports.Attempts`` in S3."""

    def __init__(self, objects: Objects, settings: StorageSettings) -> None:
        self._objects = objects
        self._bucket = settings.bucket
        self._prefix = settings.prefix

    async def next(self, task_id: str, message: str, *, redelivered: bool) -> Attempt:
        """Return the try that comes next; nothing is written. Raises ``StorageUnavailable``."""
        attempt = Attempt(task_id=task_id, message=message)
        if not redelivered:
            return attempt
        unexplained = 0
        for number in count(1):
            state = await self._read(replace(attempt, number=number))
            if state is None and number > 1:
                return replace(attempt, number=number, unexplained=unexplained)
            unexplained += state != _EXCUSED
        raise AssertionError("numbers do not end")

    async def begin(self, attempt: Attempt) -> None:
        """Write down that the try begins now. Raises ``StorageUnavailable``."""
        if attempt.number > 1:
            await self._objects.write(self._place(attempt), _content(_BEGUN))

    async def excuse(self, attempt: Attempt) -> None:
        """Write down that the try was ended through no fault of the message. Raises ``StorageUnavailable``."""
        await self._objects.write(self._place(attempt), _content(_EXCUSED))

    async def _read(self, attempt: Attempt) -> object:
        body = await self._objects.read(self._place(attempt))
        return None if body is None else json.loads(body)

    def _place(self, attempt: Attempt) -> ObjectAddress:
        name = f"attempts/{attempt.message}-{attempt.number}.json"
        return ObjectAddress(self._bucket, object_key(self._prefix, attempt.task_id, name))


def _content(state: dict[str, str]) -> ObjectContent:
    body = json.dumps(state).encode()
    return ObjectContent(body=body, sha256=hashlib.sha256(body).hexdigest(), content_type="application/json")
