# SPDX-License-Identifier: Apache-2.0
"""The policies in force on the queues of requests: those that break the limit, or lose what a worker counts on.

Of the workers' queues, an operator's policy may cover any. RabbitMQ compares a policy with the queue's own arguments:
of two limits the smaller one counts; of two overflows the queue's on a classic queue, and the policy's on a quorum one.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from acestep_consumer.broker.management import QueuePolicy
from acestep_consumer.broker.topology import CAPACITY, GENERATE, IDENTIFIED, NOTICES, UNREACHED_DELIVERY_LIMIT, tier_of
from acestep_consumer.commands.doctor.report import Finding, ok, warn

_UNLIMITED: Final = frozenset({IDENTIFIED, NOTICES})


def judge_policies(found: Iterable[QueuePolicy], limit: int, vhost: str) -> Finding:
    """Report policies that break a guarantee. ``limit``: as in ``ACESTEP_QUEUE_MAXSIZE``."""
    said, names = [], set[str]()
    for queue in found:
        for problem in _problems(queue, limit):
            said.append(f"{queue.name}: {problem}")
            names |= set(queue.policies)
    if not said:
        return ok("policies", "none in force breaks the queue limit, or loses requests")
    which = "policy" if len(names) == 1 else "policies"
    if not names:
        return warn("policies", "\n".join(said), "the next worker that starts says how to set it")
    return warn(
        "policies",
        "\n".join(said),
        f"take this out of the {which} {', '.join(map(repr, sorted(names)))}, or narrow the pattern: it is to match no "
        "queue whose name begins with acestep.\n"
        f"rabbitmqctl list_policies -p {vhost}\nrabbitmqctl list_operator_policies -p {vhost}",
    )


def _problems(queue: QueuePolicy, limit: int) -> Iterator[str]:
    if queue.name == GENERATE or tier_of(queue.name) is not None:
        yield from _problems_of_limit(queue, limit)
    elif queue.name in _UNLIMITED:
        yield from _needless_limit(queue)
    else:
        return
    policy = queue.policy
    if "max-length-bytes" in policy:
        yield f"max-length-bytes = {policy['max-length-bytes']}: it is full before the limit of messages is reached"
    if (ttl := policy.get("message-ttl")) is not None:
        ends = "terminal events are lost" if queue.name == NOTICES else "requests end as expired"
        yield f"message-ttl = {ttl}: {ends} that wait longer than {ttl / 1000:g} s"
    if expires := policy.get("expires"):
        yield f"expires = {expires}: it is deleted with all that waits after {expires / 1000:g} s without a worker"
    deliveries = policy.get("delivery-limit", UNREACHED_DELIVERY_LIMIT)
    if queue.kind == "quorum" and 0 <= deliveries < UNREACHED_DELIVERY_LIMIT:  # below 0: unlimited
        yield f"delivery-limit = {deliveries}: requests are given up then, whatever ACESTEP_MAX_ATTEMPTS says"


def _problems_of_limit(queue: QueuePolicy, limit: int) -> Iterator[str]:
    overflow = queue.policy.get("overflow", "reject-publish")
    if overflow != "reject-publish" and (queue.kind == "quorum" or "x-overflow" not in queue.arguments):
        loses = (
            "a full queue drops its oldest request for each new one, and workers that put it back drop the next"
            if overflow == "drop-head"
            else "a request that a full queue rejects runs all the same, once it is put back"
        )
        yield f"overflow = {overflow}: {loses}; no producer is told that the queue is full"
    if queue.policies == (CAPACITY,):
        return  # a worker set it, perhaps a moment ago: the limit is measured
    limits = (queue.arguments.get("x-max-length"), queue.policy.get("max-length"))
    length = min((each for each in limits if each is not None), default=None)
    if length is None:
        yield f"no limit is in force, and ACESTEP_QUEUE_MAXSIZE is {limit:,}"
    elif length != limit:
        yield f"max-length = {length}: ACESTEP_QUEUE_MAXSIZE is {limit:,}"


def _needless_limit(queue: QueuePolicy) -> Iterator[str]:
    if "max-length" in queue.policy:
        drops = "notices of terminal events" if queue.name == NOTICES else "requests that were accepted"
        yield f"max-length = {queue.policy['max-length']}: it needs none, and {drops} are dropped or refused"
