# SPDX-License-Identifier: Apache-2.0
"""Attempt records: how often a message was tried, and how many of these attempts ended without an explanation.

A broker does not say enough: a classic queue only that there was an attempt before, a quorum queue counts requeues too.
So workers record attempts beside the songs, ``<prefix>/<task_id>/attempts/<message>-<number>.json``, a small object
each. The first attempt of a message is not recorded, so that a job without trouble costs nothing; a redelivered message
had one attempt at least. A worker that requeues a message deliberately excuses its attempt. One that is not excused
ended with the death of its worker, and the message may have been the cause. When the message has ended, its records are
removed, if the keys allow that.
"""

import json
from dataclasses import replace
from typing import Final

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.job import Attempt
from acestep_consumer.domain.objects import ObjectAddress, ObjectContent
from acestep_consumer.domain.ports import Objects
from acestep_consumer.storage.results import object_key

_BEGUN: Final = {"state": "begun"}
_EXCUSED: Final = {"state": "excused"}


class AttemptRecords:
    """``ports.AttemptStore`` on an object storage."""

    def __init__(self, objects: Objects, settings: StorageSettings) -> None:
        self._objects = objects
        self._bucket = settings.bucket
        self._prefix = settings.prefix

    async def next(self, task_id: str, message: str, *, redelivered: bool) -> Attempt:
        """Return the attempt that comes next; nothing is written. Raises ``StorageUnavailable``."""
        attempt = Attempt(task_id=task_id, message=message)
        if not redelivered:
            return attempt
        number, state, unexplained = 1, await self._read(attempt), 0
        while number == 1 or state is not None:
            unexplained += state != _EXCUSED["state"]
            number += 1
            state = await self._read(replace(attempt, number=number))
        return replace(attempt, number=number, unexplained=unexplained)

    async def begin(self, attempt: Attempt) -> None:
        """Record that the attempt begins now. Raises ``StorageUnavailable``."""
        if attempt.number > 1:
            await self._objects.put(self._place(attempt), _content(_BEGUN))

    async def excuse(self, attempt: Attempt) -> None:
        """Record that the attempt ended through no fault of the message. Raises ``StorageUnavailable``."""
        await self._objects.put(self._place(attempt), _content(_EXCUSED))

    async def forget(self, task_id: str, message: str) -> None:
        """Remove the records of a message that has ended. Raises ``StorageUnavailable``."""
        found = await self.next(task_id, message, redelivered=True)
        # Backwards: an interruption leaves the first ones, which the next call finds.
        for number in range(found.number - 1, 0, -1):
            await self._objects.delete(self._place(replace(found, number=number)))

    async def _read(self, attempt: Attempt) -> str | None:
        """Return the state of an attempt; None: it was not recorded."""
        found = await self._objects.get(self._place(attempt))
        return None if found is None else _state(found.body)

    def _place(self, attempt: Attempt) -> ObjectAddress:
        name = f"attempts/{attempt.message}-{attempt.number}.json"
        return ObjectAddress(self._bucket, object_key(self._prefix, attempt.task_id, name))


def _state(body: bytes) -> str:
    """Return the state in a record of any version; one that cannot be read says that the attempt began."""
    try:
        found = json.loads(body)
        return str(found["state"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return _BEGUN["state"]


def _content(state: dict[str, str]) -> ObjectContent:
    return ObjectContent.of(json.dumps(state).encode(), "application/json")
