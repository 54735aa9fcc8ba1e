# SPDX-License-Identifier: Apache-2.0
"""Differences between RabbitMQ versions: priorities, streams, and how long they wait for an ack. Pure.

Tested with 3.10.8 and 4.3.6.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from acestep_consumer.broker.consumer import CONSUMER_TIMEOUT_MS

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
    """Return (3, 10) for ``3.10.8``; None where the text does not begin with a version."""
    found = _NUMBER.match(version or "")
    return (int(found[1]), int(found[2])) if found else None


def untested(version: Version) -> str | None:
    """Return a note for a version older or newer than the supported ones; None: it is one of them."""
    if version < OLDEST:
        return f"older than {OLDEST[0]}.{OLDEST[1]}, the oldest supported one"
    if version > NEWEST:
        return f"newer than {NEWEST[0]}.{NEWEST[1]}, the newest tested one"
    return None


def differences(version: Version, queue_type: str) -> Iterator[str]:
    """Yield the properties of this queue type in this version, a line each."""
    if queue_type == "classic":
        yield "classic queue: the limit is exact, priorities 0 to 9"
        return
    yield "quorum queue: a burst may overshoot the limit"
    if version < _TWO_PRIORITIES:
        yield "quorum queues ignore priorities before RabbitMQ 4.0"
    elif version < _ALL_PRIORITIES:
        yield "quorum queues have two priorities before RabbitMQ 4.3: up to 4, and above"
    else:
        yield "quorum queues honour priorities"


# RabbitMQ's default since 3.8.17.
DEFAULT_S = 1_800.0
# The longest job to expect where the operator sets no limit: the largest batch on a slow GPU.
LONGEST_JOB_S = 7_200.0

_ASKED_BY_CONSUMERS = (3, 12)
_NONE_ON_CLASSIC = (4, 3)


def ack_timeout_warning(
    version: str | None, queue_type: str, longest_s: float | None, broker_s: float | None
) -> str | None:
    """Return a warning for the operator; None: the broker waits long enough, or its version is unknown.

    Args:
        version: the broker's, such as ``3.10.8``.
        queue_type: ``classic`` or ``quorum``.
        longest_s: the most seconds that one job may run; None: no limit. Jobs of a worker run together, so that no
            delivery waits for another.
        broker_s: the broker's ``consumer_timeout`` in seconds as the operator set it, 0: off; None: the default.
    """
    if version is None or (number := number_of(version)) is None:
        return None
    limit_s, worst_s = _limit_s(number, queue_type, broker_s), longest_s or LONGEST_JOB_S
    if limit_s >= worst_s:
        return None
    # Twice as long leaves time for the upload and the event; and the broker checks once a minute.
    enough_ms = math.ceil(max(LONGEST_JOB_S, 2 * worst_s if longest_s else 0)) * 1_000
    source = "its default" if broker_s is None else "as ACESTEP_AMQP_CONSUMER_TIMEOUT_S says"
    worst = "no limit is set on a job" if longest_s is None else f"a job may run {longest_s:g} s"
    return (
        f"RabbitMQ {version} requeues a message after {limit_s:g} s without an ack (consumer_timeout, {source}), and "
        f"{worst} (ACESTEP_EXECUTION_TIMEOUT_S): longer jobs would be done again and again. Set `consumer_timeout = "
        f"{enough_ms}` in rabbitmq.conf, or until its restart run `rabbitmqctl eval 'application:set_env(rabbit, "
        f"consumer_timeout, {enough_ms}).'`; then start the worker with ACESTEP_AMQP_CONSUMER_TIMEOUT_S="
        f"{enough_ms // 1_000}, which cannot be read over AMQP"
    )


def _limit_s(version: tuple[int, int], queue_type: str, broker_s: float | None) -> float:
    if queue_type == "quorum" and version >= _ASKED_BY_CONSUMERS:
        return CONSUMER_TIMEOUT_MS / 1_000
    if queue_type == "classic" and version >= _NONE_ON_CLASSIC:
        return math.inf
    return math.inf if broker_s == 0 else DEFAULT_S if broker_s is None else broker_s
