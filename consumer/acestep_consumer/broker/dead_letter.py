# SPDX-License-Identifier: Apache-2.0
"""Properties of dead-lettered messages: the message's own, and headers with the reason.

Written when a message is dead-lettered, read when a person looks at it, removed again when it is requeued.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pamqp.commands import Basic

from acestep_consumer.domain.ports import BodyFormat
from acestep_schemas.events import ErrorCode

if TYPE_CHECKING:
    from acestep_consumer.domain.errors import ConsumerError

# Prefix of the headers that are added here and removed when the message is requeued.
OURS = "x-acestep-"
CODE = "x-acestep-code"
REASON = "x-acestep-reason"
WORKER = "x-acestep-worker"
TIME = "x-acestep-time"
ATTEMPTS = "x-acestep-attempts"
EXPIRATION = "x-acestep-expiration"
"""The expiration that the producer set, in milliseconds, where the message's own was reduced or removed."""
RETURNED = "x-acestep-returned"
"""Marks a message that the broker dead-lettered while a worker had it, and that was put back into the queue."""
USER_ID = "x-acestep-user-id"
TIERS = "x-acestep-tiers"
"""Names of the tiers to which the message was forwarded, with commas between them."""
DEATHS = "x-acestep-deaths"
"""The broker's x-death of a notice that was published again: brokers may drop a client's header of that name."""

# RabbitMQ routes a message to the queues in these headers as well: each publish would make one more copy.
_EXTRA_ROUTING = ("CC", "BCC")

# Headers that the broker adds when it redelivers or dead-letters a message.
BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")

MAX_REASON_CHARACTERS = 1_000
_PERSISTENT = 2


@dataclass(frozen=True, slots=True)
class DeadLetterReason:
    """Reason for which a message was dead-lettered."""

    code: str
    """An ``ErrorCode``; where the broker did it, its own reason: expired, rejected, maxlen, delivery_limit."""
    reason: str
    at: datetime | None
    """When, in UTC; None: unknown."""
    attempts: int | None
    """How often it was delivered; None: unknown."""
    worker: str | None


def format_of(properties: Basic.Properties) -> BodyFormat:
    """Return how a message's body is written."""
    return BodyFormat(
        content_type=properties.content_type or None, content_encoding=properties.content_encoding or None
    )


def dead_letter_properties(
    properties: Basic.Properties, reason: ConsumerError | None, worker_id: str
) -> Basic.Properties:
    """Return the properties to publish a dead letter with.

    They are the message's own, except: it is persistent; it does not expire; its user moves to a header, because the
    broker accepts no other user than the publisher's; the cluster id, which is obsolete, is left out.
    """
    return _copy(properties, _headers(properties, reason, worker_id))


def death_of(headers: dict[str, Any]) -> DeadLetterReason:
    """Read the reason from the headers of the worker, or else of the broker."""
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
                code, f"dead-lettered by the broker in {queue}: {code}", _utc(last.get("time")), attempts, None
            )
    return DeadLetterReason("unknown", "no reason was recorded", None, attempts, None)


def requeued_properties(properties: Basic.Properties) -> Basic.Properties:
    """Return the properties of a dead letter as its producer sent them, to publish it as a new request.

    Without the expiration, which is over, and the user, because the broker accepts no other than the publisher's. The
    timestamp is the present time, so that earlier deadlines and cancellations do not apply.
    """
    requeued = _copy(properties, _producer_headers(properties))
    requeued.timestamp = datetime.now(UTC).replace(microsecond=0)
    return requeued


def returned_properties(properties: Basic.Properties) -> Basic.Properties:
    """Return the properties of a message that is put back into its queue as the same request, not as a new one."""
    return _copy(properties, {**_kept_headers(properties), RETURNED: True})


def forwarded_properties(
    properties: Basic.Properties, waited_s: float | None, *, redelivered: bool
) -> Basic.Properties:
    """Return the properties of a message that is forwarded to another queue as the same request.

    Its expiration is reduced by ``waited_s``, the seconds that it has waited; None: unknown.
    """
    headers = _kept_headers(properties)
    copy = _copy(properties, {**headers, RETURNED: True} if redelivered else headers)
    if properties.expiration:
        left_ms = float(properties.expiration) - 1000 * (waited_s or 0)
        copy.expiration = str(max(0, round(left_ms)))
    return copy


def sent_expiration(properties: Basic.Properties) -> str | None:
    """Return the expiration that the producer set; None: none.

    It is the same at each delivery: a forwarded message has less left, and the broker removes it from a dead letter.
    """
    headers = properties.headers or {}
    if found := headers.get(EXPIRATION) or properties.expiration:
        return str(found)
    match headers.get(DEATHS) or headers.get("x-death"):
        case [{"original-expiration": found}, *_]:
            return str(found)
    return None


def visited_tiers(properties: Basic.Properties) -> tuple[str, ...]:
    """Return the tiers to which a message was forwarded so far."""
    names = (properties.headers or {}).get(TIERS)
    return tuple(names.split(",")) if isinstance(names, str) and names else ()


def _kept_headers(properties: Basic.Properties) -> dict[str, Any]:
    """Return the headers of a copy that is the same request."""
    expiration = sent_expiration(properties)
    kept = {EXPIRATION: expiration, TIERS: ",".join(visited_tiers(properties))}
    return _producer_headers(properties) | {name: value for name, value in kept.items() if value}


def _producer_headers(properties: Basic.Properties) -> dict[str, Any]:
    """Return the producer's own headers, without those that would send copies to other queues."""
    headers = properties.headers or {}
    return {
        name: writable(value) for name, value in headers.items() if not _is_added(name) and name not in _EXTRA_ROUTING
    }


def _is_added(name: str) -> bool:
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
    headers = {name: writable(value) for name, value in (properties.headers or {}).items()}
    moved = {EXPIRATION: sent_expiration(properties), USER_ID: properties.user_id}
    headers |= {name: value for name, value in moved.items() if value}
    redelivered = headers.get("x-delivery-count")
    if isinstance(redelivered, int):
        # Copied now, because a quorum queue of dead letters counts in the same header how often somebody looked.
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


def writable(value: Any) -> Any:
    """Return a header value that the codec can write; it reads more types than it writes."""
    match value:
        case dict():
            return {name: writable(item) for name, item in value.items()}
        case list():
            return [writable(item) for item in value]
        case bytes():
            return bytearray(value)
        case float():
            return value if _is_single(value) else repr(value)
    return value


def _is_single(value: float) -> bool:
    """Whether a float survives single precision, in which the codec writes it."""
    try:
        written: float = struct.unpack(">f", struct.pack(">f", value))[0]
    except OverflowError:
        return False
    return written == value
