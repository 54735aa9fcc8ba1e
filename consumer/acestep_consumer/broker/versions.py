# SPDX-License-Identifier: Apache-2.0
"""What is different from one RabbitMQ to the next, as far as it matters here. Pure.

Tested are 3.10.8 and 4.3.6. How long a version waits for an ack has a module of its own, ``ack_timeout``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

Version = tuple[int, int]

OLDEST: Version = (3, 10)
NEWEST: Version = (4, 3)
# Cancellations are kept in a stream.
STREAMS: Version = (3, 9)

_TWO_PRIORITIES: Version = (4, 0)
_ALL_PRIORITIES: Version = (4, 3)
_NUMBER = re.compile(r"(\d+)\.(\d+)")


def number_of(version: str | None) -> Version | None:
    """Read ``3.10.8`` as (3, 10); None for what does not begin like that."""
    found = _NUMBER.match(version or "")
    return (int(found[1]), int(found[2])) if found else None


def untested(version: Version) -> str | None:
    """Say in which direction a version lies outside those that are supported; None: it is one of them."""
    if version < OLDEST:
        return f"older than {OLDEST[0]}.{OLDEST[1]}, the oldest supported one"
    if version > NEWEST:
        return f"newer than {NEWEST[0]}.{NEWEST[1]}, the newest tested one"
    return None


def differences(version: Version, queue_type: str) -> Iterator[str]:
    """Yield what to expect of this version with this kind of queue, a line each."""
    if queue_type == "classic":
        yield "classic queue: the limit is exact, priorities 0 to 9"
        return
    yield "quorum queue: a burst may overshoot the limit"
    if version < _TWO_PRIORITIES:
        yield "quorum queues ignore priorities before RabbitMQ 4.0"
    elif version < _ALL_PRIORITIES:
        yield "quorum queues know two priorities before RabbitMQ 4.3: up to 4, and above"
    else:
        yield "quorum queues honour priorities"
