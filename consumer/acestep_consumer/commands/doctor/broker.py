# SPDX-License-Identifier: Apache-2.0
"""``doctor`` at the broker: version, topology, limit, permissions, acks, and the management API where one is set."""

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import AsyncExitStack
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
from acestep_consumer.broker.queue_limit import LimitInForce
from acestep_consumer.broker.topology import (
    DEAD_LETTER,
    GENERATE,
    NOTICES,
    UNROUTED,
    UNROUTED_KEPT,
    Topology,
    tier_queue,
    topology_with,
)
from acestep_consumer.broker.versions import STREAMS, ack_timeout_warning, differences, number_of, untested
from acestep_consumer.commands.doctor.report import Finding, fail, ok, skip, warn
from acestep_consumer.commands.tier_names import tier_names
from acestep_consumer.config.settings import BrokerSettings, Settings
from acestep_consumer.policy.tiers import TierTableError

CHECKS: Final = ("broker", "acks", "permissions", "limit", "topology", "queue")
_NAME: Final = "acestep-consumer doctor"
# It is measured by publishing to a throw-away queue and reading from it.
_TO_MEASURE: Final = {
    MissingPermission("configure", GENERATE),
    MissingPermission("write", DEFAULT_EXCHANGE),
    MissingPermission("read", GENERATE),
}
_DECLARES: Final = "a worker declares it when it starts, or: acestep-consumer topology --declare"
_MAY_SET: Final = {"administrator", "policymaker"}


async def look_at_broker(settings: Settings) -> AsyncGenerator[Finding]:
    """Ask the broker through AMQP. Nothing on it is changed."""
    inspection = BrokerInspection(settings.broker, _NAME)
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
        async for finding in _standing(inspection, settings.broker):
            yield finding
        if tiers := _tiers(settings):
            yield judge_tiers(await inspection.depths(map(tier_queue, tiers)))


async def look_at_management(settings: BrokerSettings) -> AsyncGenerator[Finding]:
    """Ask the management API: the user's tags, the bindings, and what time it is there."""
    if settings.management_url is None:
        yield skip(
            "management", "ACESTEP_MANAGEMENT_URL is not set; the limit is then fixed when the queue is declared"
        )
        return
    async with ManagementClient(settings) as monitor:
        try:
            yield judge_tags(await monitor.tags())
            yield judge_bindings(topology_with(settings, None), await monitor.bindings())
        except BrokerRefused as refusal:
            yield fail("management", str(refusal), "correct ACESTEP_MANAGEMENT_URL, or unset it")
            return
        except BrokerError as fault:
            yield fail("management", describe(fault), "a worker waits for it at its start; unset it to do without")
            return
        if monitor.time is not None:
            yield clock("broker clock", monitor.time, datetime.now(UTC))


def _unreachable(address: str, fault: BrokerError) -> Finding:
    if isinstance(fault, BrokerRefused):
        return fail("broker", f"{address} refuses: {fault}")
    return fail(
        "broker", f"{address} is out of reach: {describe(fault)}", "start RabbitMQ, or correct ACESTEP_AMQP_URL"
    )


def _version(inspection: BrokerInspection, settings: Settings) -> Iterator[Finding]:
    broker = settings.broker
    yield judge_version(inspection.version, inspection.address, broker.queue_type)
    longest_s = settings.worker.execution_timeout_s
    yield judge_acks(
        ack_timeout_warning(inspection.version, broker.queue_type, longest_s, broker.consumer_timeout_s),
    )


async def _standing(inspection: BrokerInspection, settings: BrokerSettings) -> AsyncGenerator[Finding]:
    wanted = topology_with(settings, settings.queue_maxsize)
    lacking = await inspection.missing_permissions(wanted)
    yield judge_permissions(lacking, vhost_of(settings))
    try:
        limit = None if (unmeasurable := _TO_MEASURE & set(lacking)) else await inspection.limit()
    except BrokerRefused as refusal:
        # It differs in more than the limit, or may not be asked: the comparison says which.
        yield skip("limit", f"the queue does not let it be measured: {_first_line(refusal)}")
        limit = None
    else:
        unmeasured = skip("limit", f"this user may not {', '.join(map(str, unmeasurable))}")
        yield unmeasured if unmeasurable else judge_limit(limit, settings)
    argument = limit.argument if limit else settings.queue_maxsize if settings.management_url is None else None
    yield judge_topology(await inspection.compare(topology_with(settings, argument)))
    depths = await inspection.depths((GENERATE, DEAD_LETTER, NOTICES, UNROUTED))
    yield judge_depths(depths, settings.queue_maxsize)


def _tiers(settings: Settings) -> tuple[str, ...] | None:
    """The tiers that requests are sent on to; None: they are not, or the table cannot be read, which `tier` says."""
    try:
        return tier_names(settings)
    except TierTableError:
        return None


def judge_version(version: str | None, address: str, queue_type: str) -> Finding:
    """Say which RabbitMQ it is and what is different about it."""
    number = number_of(version)
    if version is None or number is None:
        return warn("broker", f"{address} does not tell its version", "supported is RabbitMQ 3.10 to 4.3")
    said = f"RabbitMQ {version} at {address}; {'; '.join(differences(number, queue_type))}"
    if number < STREAMS:
        return fail("broker", said, "install RabbitMQ 3.10 or later: cancellations are kept in a stream")
    if odd := untested(number):
        return warn("broker", f"{said}; {odd}", "supported is RabbitMQ 3.10 to 4.3")
    return ok("broker", said)


def judge_acks(warning: str | None) -> Finding:
    """Say whether the broker lets a worker keep a message for as long as a job may take."""
    if warning is None:
        return ok("acks", "the broker waits for an ack as long as a job may take")
    said, _, cure = warning.partition(": longer jobs would be done again and again. ")
    return warn("acks", f"{said}: longer jobs would be done again and again", cure or None)


def judge_permissions(lacking: tuple[MissingPermission, ...], vhost: str) -> Finding:
    """Say what this user may not do."""
    if not lacking:
        return ok("permissions", "this user may configure, write and read what a worker needs")
    if lacking[0].operation == "configure":
        said = f"this user may not {lacking[0]}; write and read were not tried"
    else:
        said = f"this user may not {', '.join(map(str, lacking))}"
    rights = "'^acestep[.].*' '^(acestep[.].*|amq[.]default)$' '^acestep[.].*'"
    return fail("permissions", said, f"rabbitmqctl set_permissions -p {vhost} USER {rights}")


def judge_limit(found: LimitInForce | None, settings: BrokerSettings) -> Finding:
    """Say how many requests may wait, as measured."""
    wanted = settings.queue_maxsize
    if found is None:
        return warn("limit", f"there is no {GENERATE} yet", f"it will hold {wanted:,} messages; {_DECLARES}")
    if found.objection is None:
        where = "a policy" if found.argument is None else "the queue's argument"
        return ok("limit", f"{wanted:,} messages may wait, by {where}: as ACESTEP_QUEUE_MAXSIZE says")
    said, _, cure = found.objection.partition("\n")
    raised = found.argument is None or found.argument >= wanted
    if settings.management_url is not None and raised:
        # The policy is set at each start: only what a start cannot change is an error.
        return warn("limit", said, f"the next worker that starts sets the policy to {wanted:,}")
    return fail("limit", said, cure or None)


def judge_topology(found: TopologyDiff) -> Finding:
    """Say whether exchanges and queues stand as the settings want them."""
    if found.different:
        said = "\n".join(found.different)
        return fail("topology", f"declared otherwise than the settings want it: {said}")
    if found.missing:
        return warn("topology", f"not there yet: {', '.join(found.missing)}", _DECLARES.replace("it when", "them when"))
    if found.unseen:
        said = f"this user may not compare {', '.join(found.unseen)}"
        return fail("topology", said, "a worker declares its queues: give its user configure permission on acestep.*")
    return ok("topology", "exchanges and queues stand as the settings want them; AMQP does not tell of bindings")


def judge_bindings(wanted: Topology, found: frozenset[tuple[str, str, str]]) -> Finding:
    """Say which bindings are missing."""
    missing = [
        f"{each.exchange} → {each.queue}" + (f" ({each.routing_key})" if each.routing_key else "")
        for each in wanted.bindings
        if (each.exchange, each.queue, each.routing_key) not in found
    ]
    if missing:
        return warn("bindings", f"not there: {', '.join(missing)}", _DECLARES.replace("it when", "them when"))
    return ok("bindings", f"all {len(wanted.bindings)} are there")


def judge_tags(tags: frozenset[str]) -> Finding:
    """Say whether the user may set the policy that holds the limit."""
    if tags & _MAY_SET:
        return ok("management", f"answers; the user's tags: {', '.join(sorted(tags))}")
    said = f"the user may not set policies; its tags: {', '.join(sorted(tags)) or 'none'}"
    return fail("management", said, "rabbitmqctl set_user_tags USER monitoring policymaker")


def judge_depths(depths: Mapping[str, QueueDepth | None], limit: int) -> Finding:  # noqa: PLR0911 - a line per cause
    """Say what waits; work that nobody takes and letters that nobody reads are worth a line."""
    requests = depths[GENERATE]
    if requests is None:
        return skip("queue", f"there is no {GENERATE} yet")
    waiting, consumers = requests.ready, requests.consumers
    dead, notices, unheard = (each.ready if each else 0 for each in map(depths.get, (DEAD_LETTER, NOTICES, UNROUTED)))
    said = f"{waiting:,} of {limit:,} wait; consumers: {consumers}, dead letters: {dead:,}"
    if waiting and not consumers:
        return warn("queue", said, "no worker takes them: acestep-consumer run")
    if waiting >= limit:
        return warn("queue", f"{said}; producers are refused", "start more workers, or wait")
    if dead:
        return warn("queue", said, "acestep-consumer dead list")
    if notices and not consumers:
        return warn("queue", f"{said}; ends that no worker has told yet: {notices:,}", "acestep-consumer run")
    if unheard >= UNROUTED_KEPT:
        return warn("queue", f"{said}; {UNROUTED} is full of events that nobody was bound to hear", _UNHEARD)
    return ok("queue", said)


def judge_tiers(depths: Mapping[str, QueueDepth | None]) -> Finding:
    """Say whether the queues of what is sent on to larger cards stand, and what waits in them."""
    if missing := [queue for queue, depth in depths.items() if depth is None]:
        return warn("tier queues", f"not there yet: {', '.join(missing)}", _DECLARES.replace("it when", "them when"))
    waiting = sum(depth.ready for depth in depths.values() if depth)
    return ok("tier queues", f"all {len(depths)} are there; requests that were sent on and wait: {waiting:,}")


_UNHEARD: Final = "harmless: the oldest are dropped. To hear them, bind a queue to acestep.events"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


WARN_S: Final = 5.0
# S3 refuses signatures that are 15 minutes off.
REFUSED_S: Final = 900.0
_FIX: Final = "let the clock follow a time server: timedatectl set-ntp true"


def clock(check: str, there: datetime, here: datetime) -> Finding:
    """Compare two times, both with a time zone. A server's ``Date`` has whole seconds."""
    ahead_s = (here - there).total_seconds()
    if abs(ahead_s) <= WARN_S:
        return ok(check, "within a second or two of this machine's" if abs(ahead_s) > 1 else "equal to this machine's")
    said = f"this machine's clock is {abs(ahead_s):,.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
    return fail(check, f"{said}: S3 refuses signatures", _FIX) if abs(ahead_s) >= REFUSED_S else warn(check, said, _FIX)
