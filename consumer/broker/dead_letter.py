# SPDX-License-Identifier: Apache-2.0
"""The properties of a dead letter: the message's own, what a publish would refuse moved aside, and the reason."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from pamqp.commands import Basic

from schemas.events import ErrorCode

if TYPE_CHECKING:
    from consumer.errors import ConsumerError

CODE = "x-acestep-code"
REASON = "x-acestep-reason"
WORKER = "x-acestep-worker"
EXPIRATION = "x-acestep-expiration"
USER_ID = "x-acestep-user-id"

MAX_REASON_CHARACTERS = 1_000
_PERSISTENT = 2


def dead_letter_properties(
    properties: Basic.Properties, reason: ConsumerError | None, worker_id: str
) -> Basic.Properties:
    """Return the properties to publish a dead letter with.

    All stay as they came, but for four: it is persistent, whatever it was; it does not expire; its user is only
    told, because the broker lets nobody sign for another; a cluster id, obsolete, is left out.
    """
    return Basic.Properties(
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        headers=_headers(properties, reason, worker_id),
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
    return headers | {
        CODE: str(ErrorCode.INTERNAL if reason is None else reason.code),
        REASON: _cut("no reason was given" if reason is None else str(reason)),
        WORKER: worker_id,
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
