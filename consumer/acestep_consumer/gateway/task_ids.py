# SPDX-License-Identifier: Apache-2.0
"""Task ids that say of themselves that a gateway gave them out, and when.

So a replica that has never heard of a task can tell one that waits from one that does not exist, without a store: a
UUID of version 8 holds the time and a random number, one of version 5 the hash of an idempotency key, and both hold
a checksum. It guards against mistakes; whoever forges an id learns that it is "queued".
"""

import hashlib
import secrets
import time
from typing import Final
from uuid import UUID

_TIMED, _NAMED = 8, 5
_VARIANT: Final = 0b10
_TIME_BITS, _RANDOM_BITS, _CHECK_BITS = 34, 64, 24
_PAYLOAD_BITS: Final = _TIME_BITS + _RANDOM_BITS
_LOW, _MIDDLE = 62, 12
"""Bits of a UUID after the variant, and between version and variant; 48 are before the version."""


def new_task_id() -> str:
    """Return the id of a task that is accepted now."""
    return _encoded(_TIMED, int(time.time()) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS))


def task_id_of(owner: str, idempotency_key: str) -> str:
    """Return the id of the task that this owner asks for under this key: the same at every replica and every try."""
    digest = hashlib.sha256(f"{owner}\0{idempotency_key}".encode("utf-8", "backslashreplace")).digest()
    return _encoded(_NAMED, int.from_bytes(digest) >> (len(digest) * 8 - _PAYLOAD_BITS))


def is_given_out(task_id: str) -> bool:
    """Whether a gateway gave this id out."""
    try:
        value = UUID(task_id)
    except ValueError:
        return False
    return value.version in (_TIMED, _NAMED) and task_id == _encoded(value.version, _payload(value))


def accepted_at(task_id: str) -> int | None:
    """Return when the task was accepted, seconds since 1970; None where its id does not say."""
    if not is_given_out(task_id) or UUID(task_id).version != _TIMED:
        return None
    return _payload(UUID(task_id)) >> _RANDOM_BITS


def _encoded(version: int, payload: int) -> str:
    bits = payload << _CHECK_BITS | _checksum(version, payload)
    high, middle, low = bits >> (_LOW + _MIDDLE), bits >> _LOW & (1 << _MIDDLE) - 1, bits & (1 << _LOW) - 1
    return str(UUID(int=high << 80 | version << 76 | middle << 64 | _VARIANT << _LOW | low))


def _payload(value: UUID) -> int:
    high, middle, low = value.int >> 80, value.int >> 64 & (1 << _MIDDLE) - 1, value.int & (1 << _LOW) - 1
    return (high << (_LOW + _MIDDLE) | middle << _LOW | low) >> _CHECK_BITS


def _checksum(version: int, payload: int) -> int:
    digest = hashlib.sha256(f"acestep-consumer gateway {version} {payload}".encode()).digest()
    return int.from_bytes(digest[: _CHECK_BITS // 8])
