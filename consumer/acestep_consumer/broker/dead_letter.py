# SPDX-License-Identifier: Apache-2.0
"""The properties of a dead letter: the message's own, what a publish would refuse moved aside, and the reason.

Written when a message is given up, read when a person looks at it, taken off again when it gets another chance.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pamqp.commands import Basic

from acestep_schemas.events import ErrorCode

if TYPE_CHECKING:
    from acestep_consumer.domain.errors import ConsumerError

# Every header of ours begins so; none of them outlives a second chance.
OURS = "x-acestep-"
CODE = "x-acestep-code"
REASON = "x-acestep-reason"
WORKER = "x-acestep-worker"
TIME = "x-acestep-time"
ATTEMPTS = "x-acestep-attempts"
EXPIRATION = "x-acestep-expiration"
RETURNED = "x-acestep-returned"
"""Of a message that the broker gave up while a worker had it, and that is in the queue again."""
USER_ID = "x-acestep-user-id"

# RabbitMQ routes a message to the queues that these name as well, whoever publishes it: one copy more at each publish.
_ADDRESSES = ("CC", "BCC")

# What the broker writes down when it delivers a message again, or gives it up itself.
BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")

MAX_REASON_CHARACTERS = 1_000
_PERSISTENT = 2


@dataclass(frozen=True, slots=True)
class DeadLetterReason:
    """Why a message is among the dead letters."""

    code: str
    """An ``ErrorCode``; for what the broker gave up itself its own word: expired, rejected, maxlen, delivery_limit."""
    reason: str
    at: datetime | None
    """When, as far as known; in UTC."""
    attempts: int | None
    """How often it was delivered, as far as known."""
    worker: str | None


def dead_letter_properties(
    properties: Basic.Properties, reason: ConsumerError | None, worker_id: str
) -> Basic.Properties:
    """Return the properties to publish a dead letter with.

    All stay as they came, but for four: it is persistent, whatever it was; it does not expire; its user is only
    told, because the broker lets nobody sign for another; a cluster id, obsolete, is left out.
    """
    return _copy(properties, _headers(properties, reason, worker_id))


def death_of(headers: dict[str, Any]) -> DeadLetterReason:
    """Read why a dead letter is one, from what the worker wrote or else the broker."""
    worker, attempts = headers.get(WORKER), headers.get(ATTEMPTS)
    attempts = attempts if isinstance(attempts, int) else None
    if CODE in headers:
        at = _utc(headers.get(TIME))
        return DeadLetterReason(
            str(headers[CODE]), str(headers.get(REASON, "")), at, attempts, str(worker) if worker else None
        )
    match headers.get("x-death"):
        case [dict() as last, *_]:
            code, queue = str(last.get("reason", "unknown")), last.get("queue", "a queue")
            return DeadLetterReason(
                code, f"the broker gave it up in {queue}: {code}", _utc(last.get("time")), attempts, None
            )
    return DeadLetterReason("unknown", "nobody wrote down why", None, attempts, None)


def revived_properties(properties: Basic.Properties) -> Basic.Properties:
    """Return the properties of a dead letter as its producer sent them, for another publish.

    Two do not come back: the expiration, because its time is over and the message is wanted now, and the user, because
    the broker lets nobody sign for another. And it is sent now: deadlines and cancellations of its first life are over.
    """
    revived = _copy(properties, _producers(properties))
    revived.timestamp = datetime.now(UTC).replace(microsecond=0)
    return revived


def returned_properties(properties: Basic.Properties) -> Basic.Properties:
    """Return the properties of a message that goes back to the queue as the one that it was, and not as a new one."""
    return _copy(properties, {**_producers(properties), RETURNED: True})


def forwarded_properties(
    properties: Basic.Properties, waited_s: float | None, *, redelivered: bool
) -> Basic.Properties:
    """Return the properties of a message that waits on in another queue, as the one that it was.

    Its expiration goes on from where it is, as far as ``waited_s`` (seconds so far) tells.
    """
    headers = _producers(properties)
    copy = _copy(properties, {**headers, RETURNED: True} if redelivered else headers)
    if properties.expiration:
        left_ms = float(properties.expiration) - 1000 * (waited_s or 0)
        copy.expiration = str(max(0, round(left_ms)))
    return copy


def _producers(properties: Basic.Properties) -> dict[str, Any]:
    """Return the producer's own headers, without what would send copies elsewhere."""
    headers = properties.headers or {}
    return {name: _writable(value) for name, value in headers.items() if not _ledger(name) and name not in _ADDRESSES}


def _ledger(name: str) -> bool:
    return name.startswith((OURS, *BROKERS))


def _utc(value: object) -> datetime | None:
    if not isinstance(value, datetime):
        return None
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _copy(properties: Basic.Properties, headers: dict[str, Any]) -> Basic.Properties:
    return Basic.Properties(
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        headers=headers,
        delivery_mode=_PERSISTENT,
        priority=properties.priority,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        message_id=properties.message_id,
        timestamp=properties.timestamp,
        message_type=properties.message_type,
        app_id=properties.app_id,
    )


def _headers(properties: Basic.Properties, reason: ConsumerError | None, worker_id: str) -> dict[str, Any]:
    headers = {name: _writable(value) for name, value in (properties.headers or {}).items()}
    aside = {EXPIRATION: properties.expiration, USER_ID: properties.user_id}
    headers |= {name: value for name, value in aside.items() if value}
    redelivered = headers.get("x-delivery-count")
    if isinstance(redelivered, int):
        # Only now: a quorum queue of dead letters counts in the same header how often somebody looked.
        headers.setdefault(ATTEMPTS, redelivered + 1)
    if reason is not None and reason.attempts is not None:
        headers[ATTEMPTS] = reason.attempts
    return headers | {
        CODE: str(ErrorCode.INTERNAL if reason is None else reason.code),
        REASON: _cut("no reason was given" if reason is None else str(reason)),
        WORKER: worker_id,
        TIME: datetime.now(UTC).replace(microsecond=0),
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[: MAX_REASON_CHARACTERS - 1]}…"


def _writable(value: Any) -> Any:
    """Return a header value that the codec can write; it reads more than it writes."""
    match value:
        case dict():
            return {name: _writable(item) for name, item in value.items()}
        case list():
            return [_writable(item) for item in value]
        case bytes():
            return bytearray(value)
        case float():
            return value if _is_single(value) else repr(value)
    return value


def _is_single(value: float) -> bool:
    """Floats are written in single precision: one that does not fit would be changed, or not written at all."""
    try:
        written: float = struct.unpack(">f", struct.pack(">f", value))[0]
    except OverflowError:
        return False
    return written == value
