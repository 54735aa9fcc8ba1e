# SPDX-License-Identifier: Apache-2.0
"""Attempt records: how often a message was tried, and how many of these attempts ended without an explanation.

A broker does not say enough: a classic queue only that there was an attempt before, a quorum queue counts requeues too.
So workers record attempts beside the songs, ``<prefix>/<task_id>/attempts/<message>-<number>.json``, a small object
each. The first attempt of a message is not recorded, so that a job without trouble costs nothing; a redelivered message
had one attempt at least. A worker that requeues a message deliberately excuses its attempt. One that is not excused
ended with the death of its worker, and the message may have been the cause. When the message has ended, its records are
removed, if the keys allow that.

A message with an expiration is given up by the broker when it is requeued too late, and whoever reads of that must know
whether a worker is at it still: its first attempt is recorded, too. A worker that was cut off from the broker renews
the records of its attempts for as long as they go on.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.job import Attempt
from acestep_consumer.domain.objects import ObjectAddress, ObjectContent, object_key
from acestep_consumer.domain.ports import Objects

_BEGUN: Final[Mapping[str, object]] = MappingProxyType({"state": "begun"})
_EXCUSED: Final[Mapping[str, object]] = MappingProxyType({"state": "excused"})
_RENEWALS: Final = "renewals"
"""Field of an attempt that goes on; other versions see it as excused."""


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

    async def begin(self, attempt: Attempt, *, expires: bool) -> None:
        """Record that the attempt begins now; the first one only if its message ``expires``.

        Raises ``StorageUnavailable``.
        """
        if expires or attempt.number > 1:
            await self._objects.put(self._place(attempt), _content(_BEGUN))

    async def renew(self, attempt: Attempt, count: int) -> None:
        """Record that the attempt goes on though its message was taken back. Raises ``StorageUnavailable``."""
        await self._objects.put(self._place(attempt), _content({**_EXCUSED, _RENEWALS: count}))

    async def excuse(self, attempt: Attempt) -> None:
        """Record that the attempt ended through no fault of the message. Raises ``StorageUnavailable``."""
        await self._objects.put(self._place(attempt), _content(_EXCUSED))

    async def unfinished(self, task_id: str, message: str, *, delivered: bool) -> tuple[bytes, ...]:
        """Return the records of attempts that may go on. Raises ``StorageUnavailable``."""
        attempt = Attempt(task_id=task_id, message=message)
        found: list[bytes] = []
        while (body := await self._body(attempt)) is not None or attempt.number == 1:
            if body is None and delivered:
                found.append(b"not recorded")
            elif body is not None and not _is_over(body):
                found.append(b"%d %s" % (attempt.number, body))
            attempt = replace(attempt, number=attempt.number + 1)
        return tuple(found)

    async def forget(self, task_id: str, message: str) -> None:
        """Remove the records of a message that has ended. Raises ``StorageUnavailable``."""
        found = await self.next(task_id, message, redelivered=True)
        # Backwards: an interruption leaves the first ones, which the next call finds.
        for number in range(found.number - 1, 0, -1):
            await self._objects.delete(self._place(replace(found, number=number)))

    async def _read(self, attempt: Attempt) -> str | None:
        """Return the state of an attempt; None: it was not recorded."""
        body = await self._body(attempt)
        return None if body is None else str(_fields(body)["state"])

    async def _body(self, attempt: Attempt) -> bytes | None:
        found = await self._objects.get(self._place(attempt))
        return None if found is None else found.body

    def _place(self, attempt: Attempt) -> ObjectAddress:
        name = f"attempts/{attempt.message}-{attempt.number}.json"
        return ObjectAddress(self._bucket, object_key(self._prefix, attempt.task_id, name))


def _is_over(body: bytes) -> bool:
    fields = _fields(body)
    return fields["state"] == _EXCUSED["state"] and _RENEWALS not in fields


def _fields(body: bytes) -> Mapping[str, object]:
    """Return the fields of a record of any version; one that cannot be read says that the attempt began."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return _BEGUN
    return found if isinstance(found, dict) and "state" in found else _BEGUN


def _content(state: Mapping[str, object]) -> ObjectContent:
    return ObjectContent.of(json.dumps(dict(state)).encode(), "application/json")
