# SPDX-License-Identifier: Apache-2.0
"""Decoders for properties on which pamqp raises, so that one odd message cannot close the connection again and again.

AMQP strings are bytes and a timestamp is 64 bits wide; the broker passes both on as they are. pamqp raises on a
``message_id`` in Latin-1, on a timestamp in microseconds, on a header name that is not UTF-8. It raises inside the
connection's reader: the connection closes, the message is redelivered, and no other message is ever reached.

A message's timestamp of 0 is none: libraries send it when nobody set one, and in 1970 every deadline would be over.
"""

from __future__ import annotations

from typing import Any

from pamqp import decode

_TIMESTAMP_BYTES = 8
_LENGTH_BYTES = 4
MAX_DEPTH = 32
"""Deeper headers are not read: writing them needs more stack than reading, so that no dead letter could be made."""
UNREADABLE_HEADERS = "x-acestep-unreadable-headers"


def install() -> None:
    """Put these decoders into pamqp's tables; harmless when repeated."""
    decode.METHODS["shortstr"] = short_string
    decode.METHODS["timestamp"] = message_timestamp
    decode.METHODS["table"] = table
    decode.TABLE_MAPPING[b"T"] = timestamp


def short_string(value: bytes) -> tuple[int, str]:
    """Return (bytes consumed, text), with ``?`` for a byte that is not UTF-8.

    One character for one byte: the text is never too long to be sent again.
    """
    try:
        return decode.short_str(value)
    except UnicodeDecodeError:
        end = 1 + value[0]
        return end, value[1:end].decode("utf-8", "replace").replace("\ufffd", "?")


def timestamp(value: bytes) -> tuple[int, Any]:
    """Return (bytes consumed, time); None for a time beyond the calendar."""
    try:
        return decode.timestamp(value)
    except (ValueError, OverflowError, OSError):
        return _TIMESTAMP_BYTES, None


def message_timestamp(value: bytes) -> tuple[int, Any]:
    """Return (bytes consumed, time) of the property ``timestamp``; None for 0, and for a time beyond the calendar."""
    return timestamp(value) if any(value[:_TIMESTAMP_BYTES]) else (_TIMESTAMP_BYTES, None)


def table(value: bytes) -> tuple[int, Any]:
    """Return (bytes consumed, headers); ``UNREADABLE_HEADERS`` alone where they cannot be decoded."""
    length = int.from_bytes(value[:_LENGTH_BYTES], "big")
    unreadable = _LENGTH_BYTES + length, {UNREADABLE_HEADERS: True}
    try:
        consumed, headers = decode.field_table(value)
    except (ValueError, RecursionError):
        return unreadable
    return unreadable if _is_too_deep(headers) else (consumed, headers)


def _is_too_deep(headers: dict[str, Any]) -> bool:
    level: list[Any] = [headers]
    for _ in range(MAX_DEPTH):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [item for items in inside for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True
