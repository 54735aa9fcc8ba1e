# SPDX-License-Identifier: Apache-2.0
"""The broker checks of ``doctor``: version, topology, limit, permissions, ack timeout, management API."""

import shlex
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from acestep_consumer.broker.errors import BrokerError, BrokerRefused, describe
from acestep_consumer.broker.inspection import (
    DEFAULT_EXCHANGE,
    BrokerInspection,
    MissingPermission,
    QueueDepth,
    TopologyDiff,
)
from acestep_consumer.broker.management import ManagementClient, vhost_of
from acestep_consumer.broker.queue_limit import LimitInForce, declared_limit
from acestep_consumer.broker.topology import (
    DEAD_LETTER,
    GENERATE,
    NOTICES,
    UNROUTED,
    UNROUTED_KEPT,
    Queue,
    Topology,
    tier_queue,
    topology_with,
)
from acestep_consumer.broker.versions import STREAMS, ack_timeout_warning, differences, number_of, untested
from acestep_consumer.commands.doctor.policies import judge_policies
from acestep_consumer.commands.doctor.probe import TIMEOUT_S
from acestep_consumer.commands.doctor.report import Finding, fail, ok, skip, warn
from acestep_consumer.commands.topology import tier_names
from acestep_consumer.config.settings import BrokerSettings, Settings
from acestep_consumer.policy.tiers import TierTableError

CHECKS: Final = ("broker", "acks", "permissions", "limit", "topology", "queue")
_NAME: Final = "acestep-consumer doctor"
# The limit is measured by publishing to a temporary queue and reading from it.
_TO_MEASURE: Final = {
    MissingPermission("configure", GENERATE),
    MissingPermission("write", DEFAULT_EXCHANGE),
    MissingPermission("read", GENERATE),
}
_DECLARES: Final = "a worker declares it when it starts; or run: acestep-consumer topology --declare"
_MAY_SET: Final = {"administrator", "policymaker"}


async def check_broker(settings: Settings, timeout_s: float = TIMEOUT_S) -> AsyncGenerator[Finding]:
    """Check the broker over AMQP, waiting ``timeout_s`` seconds for each answer. Nothing on it is changed."""
    inspection = BrokerInspection(settings.broker, _NAME, timeout_s=timeout_s)
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(inspection)
        except BrokerError as fault:
            yield _unreachable(inspection.address, fault)
            for check in CHECKS[1:]:
                yield skip(check, "no connection to the broker")
            return
        for finding in _version(inspection, settings):
            yield finding
        async for finding in _objects(inspection, settings):
            yield finding


async def _policies(monitor: ManagementClient, settings: BrokerSettings, tags: frozenset[str]) -> Finding:
    found = judge_policies(await monitor.queue_policies(), settings.queue_maxsize, vhost_of(settings))
    if not tags & _MAY_SET:
        return found  # who may not set policies may not list them either, as the finding before says
    try:
        await monitor.refuse_other_policies(settings.queue_maxsize)
    except BrokerRefused as refusal:
        reason, _, fix = str(refusal).partition(": ")
        also = f"\n{found.said}" if found.level != "ok" else ""
        return fail("policies", f"no worker starts: {reason}{also}", fix)
    return found


async def check_management(settings: BrokerSettings, timeout_s: float = TIMEOUT_S) -> AsyncGenerator[Finding]:
    """Check the management API: the user's tags, bindings, policies, the broker's clock. ``timeout_s``: as above."""
    if settings.management_url is None:
        yield skip(
            "management", "ACESTEP_MANAGEMENT_URL is not set, so the queue limit is fixed once the queue is declared"
        )
        return
    async with ManagementClient(settings, read_timeout_s=timeout_s) as monitor:
        try:
            tags = await monitor.tags()
            yield judge_tags(tags)
            yield judge_bindings(topology_with(settings, None), await monitor.bindings())
            yield await _policies(monitor, settings, tags)
        except BrokerRefused as refusal:
            yield fail("management", str(refusal), "correct ACESTEP_MANAGEMENT_URL, or unset it")
            return
        except BrokerError as fault:
            yield fail(
                "management",
                describe(fault),
                "a worker waits for it when it starts; unset ACESTEP_MANAGEMENT_URL to do without",
            )
            return
        if monitor.time is not None:
            yield clock("broker clock", monitor.time, datetime.now(UTC))


def _unreachable(address: str, fault: BrokerError) -> Finding:
    if isinstance(fault, BrokerRefused):
        return fail("broker", f"{address} refuses the connection: {fault}")
    return fail("broker", f"{address} is unreachable: {describe(fault)}", "start RabbitMQ, or correct ACESTEP_AMQP_URL")


def _version(inspection: BrokerInspection, settings: Settings) -> Iterator[Finding]:
    broker = settings.broker
    yield judge_version(inspection.version, inspection.address, broker.queue_type)
    longest_s = settings.worker.execution_timeout_s
    yield judge_acks(
        ack_timeout_warning(inspection.version, broker.queue_type, longest_s, broker.consumer_timeout_s),
    )


async def _objects(inspection: BrokerInspection, all_settings: Settings) -> AsyncGenerator[Finding]:
    settings = all_settings.broker
    wanted = topology_with(settings, settings.queue_maxsize)
    lacking = await inspection.missing_permissions(wanted)
    yield judge_permissions(lacking, vhost_of(settings))
    try:
        limit = None if (unmeasurable := _TO_MEASURE & set(lacking)) else await inspection.limit()
    except BrokerRefused as refusal:
        # The queue differs in more than the limit, or permission is missing; the topology check says which.
        yield skip("limit", f"it cannot be measured: {_first_line(refusal)}")
        limit = None
    else:
        unmeasured = skip("limit", f"this user lacks {', '.join(map(str, unmeasurable))}")
        yield unmeasured if unmeasurable else judge_limit(limit, settings)
    argument = limit.argument if limit else settings.queue_maxsize if settings.management_url is None else None
    wanted = topology_with(settings, argument)
    yield judge_topology(await inspection.compare(wanted))
    depths = await inspection.depths((GENERATE, DEAD_LETTER, NOTICES, UNROUTED))
    yield judge_depths(depths, settings.queue_maxsize)
    if tiers := _tiers(all_settings):
        differences = [await _compare_tier(inspection, wanted.tier_queue(tier)) for tier in tiers]
        yield judge_tiers(await inspection.depths(map(tier_queue, tiers)), differences, settings)


@dataclass(frozen=True, slots=True)
class TierQueueDifference:
    """Differences between a tier's queue as it was declared and as the settings ask for it.

    ``limit``: its own limit, None where it has none; ``other``: the broker's texts about other arguments.
    """

    queue: str
    limit: int | None
    other: tuple[str, ...] = ()


async def _compare_tier(inspection: BrokerInspection, wanted: Queue) -> TierQueueDifference | None:
    """Compare a tier's queue as a worker does, which takes one with another limit."""
    found = (await inspection.compare(Topology((), (wanted,), ()))).different
    if not found:
        return None
    try:
        limit = declared_limit(BrokerRefused(found[0]), wanted.name)
    except BrokerRefused:
        return TierQueueDifference(wanted.name, None, found)
    others = await inspection.compare(Topology((), (wanted.with_limit(limit),), ()))
    return TierQueueDifference(wanted.name, limit, others.different)


def _tiers(settings: Settings) -> tuple[str, ...] | None:
    """Return the tiers with queues; None without forwarding, or if the table is invalid: the tier check says so."""
    try:
        return tier_names(settings)
    except TierTableError:
        return None


def judge_version(version: str | None, address: str, queue_type: str) -> Finding:
    """Report the version and how it differs from others."""
    number = number_of(version)
    if version is None or number is None:
        return warn("broker", f"{address} does not report its version", "supported are RabbitMQ 3.10 to 4.3")
    said = f"RabbitMQ {version} at {address}; {'; '.join(differences(number, queue_type))}"
    if number < STREAMS:
        return fail("broker", said, "install RabbitMQ 3.10 or later: cancellations are kept in a stream")
    if odd := untested(number):
        return warn("broker", f"{said}; {odd}", "supported are RabbitMQ 3.10 to 4.3")
    return ok("broker", said)


def judge_acks(warning: str | None) -> Finding:
    """Report whether the broker's ack timeout is longer than the longest job."""
    if warning is None:
        return ok("acks", "the ack timeout is longer than the longest job")
    said, _, cure = warning.partition(": longer jobs would be done again and again. ")
    return warn("acks", f"{said}: longer jobs would be done again and again", cure or None)


def judge_permissions(lacking: tuple[MissingPermission, ...], vhost: str) -> Finding:
    """Report missing permissions."""
    if not lacking:
        return ok("permissions", "this user has the permissions that a worker needs")
    if lacking[0].operation == "configure":
        said = f"this user lacks {lacking[0]}; write and read were not checked"
    else:
        said = f"this user lacks {', '.join(map(str, lacking))}"
    rights = "'^acestep[.].*' '^(acestep[.].*|amq[.]default)$' '^acestep[.].*'"
    return fail("permissions", said, f"rabbitmqctl set_permissions -p {vhost} USER {rights}")


def judge_limit(found: LimitInForce | None, settings: BrokerSettings) -> Finding:
    """Report the measured queue limit."""
    wanted = settings.queue_maxsize
    if found is None:
        return warn("limit", f"there is no queue {GENERATE} yet", f"its limit will be {wanted:,} messages; {_DECLARES}")
    if found.objection is None:
        where = "a policy" if found.argument is None else "the queue's argument"
        return ok("limit", f"{wanted:,} messages, set by {where}, as in ACESTEP_QUEUE_MAXSIZE")
    said, _, cure = found.objection.partition("\n")
    raised = found.argument is None or found.argument >= wanted
    if settings.management_url is not None and raised:
        # Each worker sets the policy when it starts, so only what that cannot change is an error.
        return warn("limit", said, f"the next worker that starts sets the policy to {wanted:,}")
    return fail("limit", said, cure or None)


def judge_topology(found: TopologyDiff) -> Finding:
    """Report whether exchanges and queues match the settings."""
    if found.different:
        said = "\n".join(found.different)
        return fail("topology", f"differs from the settings: {said}")
    if found.missing:
        return warn("topology", f"missing: {', '.join(found.missing)}", _DECLARES.replace("it when", "them when"))
    if found.unseen:
        said = f"this user is not allowed to compare {', '.join(found.unseen)}"
        return fail("topology", said, "a worker declares its queues: grant its user configure permission on acestep.*")
    return ok("topology", "exchanges and queues match the settings (bindings cannot be checked over AMQP)")


def judge_bindings(wanted: Topology, found: frozenset[tuple[str, str, str]]) -> Finding:
    """Report missing bindings."""
    missing = [
        f"{each.exchange} → {each.queue}" + (f" ({each.routing_key})" if each.routing_key else "")
        for each in wanted.bindings
        if (each.exchange, each.queue, each.routing_key) not in found
    ]
    if missing:
        return warn("bindings", f"missing: {', '.join(missing)}", _DECLARES.replace("it when", "them when"))
    return ok("bindings", f"all {len(wanted.bindings)} exist")


def judge_tags(tags: frozenset[str]) -> Finding:
    """Report whether the user is allowed to set the policy of the queue limit."""
    if tags & _MAY_SET:
        return ok("management", f"answers; user tags: {', '.join(sorted(tags))}")
    said = f"the user is not allowed to set policies; user tags: {', '.join(sorted(tags)) or 'none'}"
    return fail("management", said, "rabbitmqctl set_user_tags USER monitoring policymaker")


def judge_depths(depths: Mapping[str, QueueDepth | None], limit: int) -> Finding:  # noqa: PLR0911 - a line per cause
    """Report queue depths, and warn of requests without workers and of dead letters."""
    requests = depths[GENERATE]
    if requests is None:
        return skip("queue", f"there is no queue {GENERATE} yet")
    told = depths.get(NOTICES)
    # A busy worker may have no consumer on the request queue, but each has one on the notices.
    waiting, consumers = requests.ready, requests.consumers or (told.consumers if told else 0)
    dead, notices, unrouted = (each.ready if each else 0 for each in map(depths.get, (DEAD_LETTER, NOTICES, UNROUTED)))
    said = f"{waiting:,} of {limit:,} waiting; consumers: {consumers}, dead letters: {dead:,}"
    if waiting and not consumers:
        return warn("queue", said, "no worker takes them; start one: acestep-consumer run")
    if waiting >= limit:
        return warn("queue", f"{said}; full, further requests are rejected", "start more workers, or wait")
    if dead:
        return warn("queue", said, "acestep-consumer dead list")
    if notices and not consumers:
        return warn(
            "queue", f"{said}; terminal events not published yet: {notices:,}", "start a worker: acestep-consumer run"
        )
    if unrouted >= UNROUTED_KEPT:
        return warn("queue", f"{said}; {UNROUTED} is full: {unrouted:,} events without a subscriber", _UNROUTED_FIX)
    return ok("queue", said)


def judge_tiers(
    depths: Mapping[str, QueueDepth | None], found: Iterable[TierQueueDifference | None], settings: BrokerSettings
) -> Finding:
    """Report tiers' queues that are missing or were declared otherwise, and how many forwarded requests wait."""
    different = [each for each in found if each is not None]
    if refused := [each for each in different if each.other]:
        said = "\n".join(text for each in refused for text in each.other)
        return fail("tier queues", f"no worker starts: {said}", _anew(refused, settings))
    # Each worker sets the policy where it can, and of two limits the smaller one counts.
    wanted, raised = settings.queue_maxsize, settings.management_url is not None
    if limited := [each for each in different if not (raised and (each.limit is None or each.limit >= wanted))]:
        said = "\n".join(
            f"{each.queue} was declared "
            + ("without a limit" if each.limit is None else f"for {each.limit:,} messages")
            + f", and ACESTEP_QUEUE_MAXSIZE is {wanted:,}"
            for each in limited
        )
        return warn("tier queues", said, _anew(limited, settings))
    if missing := [queue for queue, depth in depths.items() if depth is None]:
        return warn("tier queues", f"missing: {', '.join(missing)}", _DECLARES.replace("it when", "them when"))
    waiting = sum(depth.ready for depth in depths.values() if depth)
    return ok("tier queues", f"all {len(depths)} exist; forwarded requests waiting: {waiting:,}")


def _anew(queues: Iterable[TierQueueDifference], settings: BrokerSettings) -> str:
    where = shlex.quote(vhost_of(settings))
    commands = [f"rabbitmqctl delete_queue -p {where} {each.queue} --if-empty" for each in queues]
    return "\n".join(["when it is empty, delete it; a worker declares it anew when it starts", *commands])


_UNROUTED_FIX: Final = "harmless: the oldest are dropped. To receive events, bind a queue to acestep.events"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


WARN_S: Final = 5.0
# S3 refuses signatures that are 15 minutes off.
REFUSED_S: Final = 900.0
_FIX: Final = "synchronise the clock: timedatectl set-ntp true"


def clock(check: str, there: datetime, here: datetime) -> Finding:
    """Compare two times with time zones. A server's ``Date`` header has whole seconds."""
    ahead_s = (here - there).total_seconds()
    if abs(ahead_s) <= WARN_S:
        return ok(check, "within 5 s of this machine's" if abs(ahead_s) > 1 else "same as this machine's")
    said = f"this machine's clock is {abs(ahead_s):,.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
    return fail(check, f"{said}: S3 refuses signatures", _FIX) if abs(ahead_s) >= REFUSED_S else warn(check, said, _FIX)
