# SPDX-License-Identifier: Apache-2.0
"""How long the broker lets a worker keep a message, and whether that is long enough.

RabbitMQ closes the channel of a consumer that has not acked a delivery in time: all work in hand comes again, and is
made again. Which limit counts depends on its version and on the kind of queue:

=================  =========================  ==============================================
RabbitMQ           classic queue              quorum queue
=================  =========================  ==============================================
before 3.12        the broker's one setting   the broker's one setting
3.12 to 4.2        the broker's one setting   what the worker asks for when it consumes
4.3 and later      none                       what the worker asks for when it consumes
=================  =========================  ==============================================

The setting, ``consumer_timeout``, cannot be read through AMQP, nor through the management API.
"""

from __future__ import annotations

import math
import re

from acestep_consumer.broker.consumer import CONSUMER_TIMEOUT_MS

# RabbitMQ's default since 3.8.17.
DEFAULT_S = 1_800.0
# The longest that a job is believed to take where the operator sets no limit: the largest batch on a slow card.
BELIEVED_LONGEST_S = 7_200.0

_ASKED_BY_CONSUMERS = (3, 12)
_NONE_ON_CLASSIC = (4, 3)
_VERSION = re.compile(r"(\d+)\.(\d+)")


def ack_timeout_warning(
    version: str | None, queue_type: str, longest_s: float | None, broker_s: float | None
) -> str | None:
    """Return what to tell the operator at start; None when the broker waits long enough, or is an unknown one.

    Args:
        version: the broker's, such as ``3.10.8``.
        queue_type: ``classic`` or ``quorum``.
        longest_s: the most seconds that one job may run; None: not limited. Jobs in hand run together, so that no
            delivery waits for another.
        broker_s: the broker's ``consumer_timeout`` in seconds, 0: off, as far as the operator told; None: the default.
    """
    if version is None or (number := _number(version)) is None:
        return None
    limit_s, worst_s = _limit_s(number, queue_type, broker_s), longest_s or BELIEVED_LONGEST_S
    if limit_s >= worst_s:
        return None
    # Room for the upload and the event, and the broker looks only once a minute.
    enough_ms = math.ceil(max(BELIEVED_LONGEST_S, 2 * worst_s if longest_s else 0)) * 1_000
    source = "its default" if broker_s is None else "as ACESTEP_AMQP_CONSUMER_TIMEOUT_S says"
    worst = "no limit is set on a job" if longest_s is None else f"a job may run {longest_s:g} s"
    return (
        f"RabbitMQ {version} takes a message back after {limit_s:g} s without an ack (consumer_timeout, {source}), and "
        f"{worst} (ACESTEP_EXECUTION_TIMEOUT_S): longer jobs would be done again and again. Set `consumer_timeout = "
        f"{enough_ms}` in rabbitmq.conf, or until its restart run `rabbitmqctl eval 'application:set_env(rabbit, "
        f"consumer_timeout, {enough_ms}).'`; then start the worker with ACESTEP_AMQP_CONSUMER_TIMEOUT_S="
        f"{enough_ms // 1_000}, because AMQP does not tell"
    )


def _limit_s(version: tuple[int, int], queue_type: str, broker_s: float | None) -> float:
    if queue_type == "quorum" and version >= _ASKED_BY_CONSUMERS:
        return CONSUMER_TIMEOUT_MS / 1_000
    if queue_type == "classic" and version >= _NONE_ON_CLASSIC:
        return math.inf
    return math.inf if broker_s == 0 else DEFAULT_S if broker_s is None else broker_s


def _number(version: str) -> tuple[int, int] | None:
    found = _VERSION.match(version)
    return (int(found[1]), int(found[2])) if found else None
