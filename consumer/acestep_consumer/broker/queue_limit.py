# SPDX-License-Identifier: Apache-2.0
"""How many requests may wait: agreed with the broker before the first one is taken, and never silently another number.

A limit can stand in two places. As the queue's argument ``x-max-length`` it needs nothing but AMQP, and can never be
changed. As a policy it can be changed at any time, with every message staying where it is, but not through AMQP. Where
both stand, the smaller one counts.

- With ``ACESTEP_MANAGEMENT_URL`` the queue is declared without the argument, and each start sets the policy.
- Without it, a new queue gets the argument. On a queue that stands already, the limit may be what a person set.

Either way the outcome is then measured. AMQP cannot read a policy, but a throw-away queue that the same pattern covers
obeys it: it is sent one message more than the limit, and must keep exactly the limit. What differs stops the start,
with the command that puts it right.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from uuid import uuid4

from pamqp.commands import Basic

from acestep_consumer.broker.errors import BrokerRefused, mapped
from acestep_consumer.broker.management import ManagementClient, vhost_of
from acestep_consumer.broker.topology import (
    CAPACITY,
    CONTROL_LOG,
    GENERATE,
    PROBES,
    Topology,
    capacity_policy,
    declare,
    topology_with,
)

if TYPE_CHECKING:
    from aio_pika.abc import AbstractConnection
    from aiormq.abc import ArgumentsType
    from aiormq.channel import Channel

    from acestep_consumer.config.settings import BrokerSettings

# Of a larger limit only this much is measured, and the broker believed for the rest: so many messages are a second's
# work, and more would delay the start.
MEASURED_AT_MOST = 20_000
_CALL_TIMEOUT_S = 20.0
_TRANSIENT = 1
_OTHER_LENGTH = re.compile(
    r"inequivalent arg 'x-max-length' for queue '([^']*)'.*current is (?:the value )?'?(none|\d+)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class LimitInForce:
    """The limit as it stands.

    Attributes:
        argument: the queue's own, None where it has none.
        kept: how many messages were kept, of one more than wanted.
        objection: why a worker would not start with that, and the commands that put it right; None: it would.
    """

    argument: int | None
    kept: int
    objection: str | None


async def agree(connection: AbstractConnection, settings: BrokerSettings) -> Topology:
    """Make the broker hold ``settings.queue_maxsize`` waiting requests, and return the topology as it stands then.

    Raises:
        BrokerRefused: it does not, and a person has to act; the text holds the commands.
        LinkLost: the broker or its management API is out of reach.
    """
    if settings.management_url is not None:
        async with ManagementClient(settings) as management:
            await management.set_limit(settings.queue_maxsize)
    limit = await _stand(connection, settings)
    _judge(settings, limit, await _measure(connection, settings.queue_maxsize, limit))
    return topology_with(settings, limit)


async def look(connection: AbstractConnection, settings: BrokerSettings) -> LimitInForce:
    """Measure what holds now, and change nothing. The request queue must be there.

    Raises:
        BrokerRefused: the queue differs in more than its limit, or the user may not look.
        LinkLost: the broker is out of reach.
    """
    argument = await _stand(connection, settings, only=GENERATE)
    kept = await _measure(connection, settings.queue_maxsize, argument)
    try:
        _judge(settings, argument, kept)
    except BrokerRefused as refusal:
        return LimitInForce(argument, kept, str(refusal))
    return LimitInForce(argument, kept, None)


async def _stand(connection: AbstractConnection, settings: BrokerSettings, only: str | None = None) -> int | None:
    """Declare the objects, or one queue alone, and return the limit that the request queue has as its argument.

    A queue that stands keeps the argument that it was declared with; what stands already is not changed.
    """
    limit = None if settings.management_url else settings.queue_maxsize
    try:
        await _declare(connection, _part(topology_with(settings, limit), only))
    except BrokerRefused as refusal:
        limit = limit_told(refusal, GENERATE)
        await _declare(connection, _part(topology_with(settings, limit), only))
    return limit


def limit_told(refusal: BrokerRefused, queue: str) -> int | None:
    """Return the limit that this queue was declared with, where the refusal is about that; else raise the refusal."""
    found = _OTHER_LENGTH.search(str(refusal))
    if found is None or found[1] != queue:
        raise refusal
    return None if found[2] == "none" else int(found[2])


def _part(whole: Topology, only: str | None) -> Topology:
    if only is None:
        # The stream has no part in the limit, and after a crash of the broker it may be the last to come back.
        return whole.without(CONTROL_LOG)
    return Topology((), tuple(queue for queue in whole.queues if queue.name == only), ())


async def _declare(connection: AbstractConnection, wanted: Topology) -> None:
    """On a channel of its own: the broker closes it over a refusal."""
    with mapped():
        channel = await connection.channel()
    await declare(channel, wanted)
    with mapped():
        await channel.close()


async def _measure(connection: AbstractConnection, wanted: int, argument: int | None) -> int:
    """Return how many messages a queue with this argument keeps, of one more than ``wanted``.

    The queue is a classic one, whatever the real one is: on those the limit is exact.
    """
    name = f"{PROBES}{uuid4().hex}"
    # Nothing is dead-lettered here: a user who may not write to the default exchange is refused at once, by name. The
    # publishes would end the connection instead.
    arguments: ArgumentsType = {
        "x-queue-type": "classic",
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "",
    }
    if argument is not None:
        arguments["x-max-length"] = argument
    with mapped():
        opened = await connection.channel(publisher_confirms=False)
        channel = cast("Channel", await opened.get_underlay_channel())
        await channel.queue_declare(name, exclusive=True, arguments=arguments, timeout=_CALL_TIMEOUT_S)
        await _send(channel, name, min(wanted, MEASURED_AT_MOST) + 1)
        # A get waits its turn behind the messages. Asking for their number does not: the queue answers that first.
        first = await channel.basic_get(name, no_ack=True, timeout=_CALL_TIMEOUT_S)
        await channel.queue_delete(name, timeout=_CALL_TIMEOUT_S)
        await opened.close()
    return 0 if first.message_count is None else first.message_count + 1


async def _send(channel: Channel, queue: str, count: int) -> None:
    for _ in range(count):
        properties = Basic.Properties(delivery_mode=_TRANSIENT)
        await channel.basic_publish(b"", routing_key=queue, properties=properties, wait=False)


def _judge(settings: BrokerSettings, argument: int | None, kept: int) -> None:
    """Compare what was measured with what is wanted. Raises ``BrokerRefused``."""
    wanted = settings.queue_maxsize
    if argument is not None and argument < wanted:
        raise BrokerRefused(_to_be_made_anew(settings, argument))
    if kept <= MEASURED_AT_MOST or wanted <= MEASURED_AT_MOST:
        if kept != wanted:
            raise BrokerRefused(_to_be_set(settings, argument, kept))
    elif settings.management_url is None and argument != wanted:
        raise BrokerRefused(
            f"ACESTEP_QUEUE_MAXSIZE is {wanted}, and {GENERATE} was declared otherwise. A limit above "
            f"{MEASURED_AT_MOST:,} cannot be seen through AMQP: set ACESTEP_MANAGEMENT_URL, so that the worker sets it"
        )


def _to_be_set(settings: BrokerSettings, argument: int | None, kept: int) -> str:
    wanted, vhost = settings.queue_maxsize, vhost_of(settings)
    if kept < wanted:
        standing = f"a policy lets {GENERATE} hold only {kept:,} messages"
    elif argument is None:
        standing = f"no policy limits {GENERATE} to {wanted:,} messages"
    else:
        standing = f"{GENERATE} was declared for {argument:,} messages, and no policy lowers that"
    standing = f"{standing}, and ACESTEP_QUEUE_MAXSIZE is {wanted}"
    if settings.management_url is None:
        return (
            f"{standing}. The messages stay where they are when you set ACESTEP_MANAGEMENT_URL, with which the worker "
            f"sets the policy itself, or run this and start again:\n{capacity_policy(wanted).as_command(vhost)}"
        )
    return (
        f"{standing}, although the policy {CAPACITY} is set: another policy or an operator policy counts for queues "
        f"whose names begin with {GENERATE}; see rabbitmqctl list_policies and rabbitmqctl list_operator_policies"
    )


def _to_be_made_anew(settings: BrokerSettings, argument: int) -> str:
    vhost = vhost_of(settings)
    where = shlex.quote(vhost)
    return (
        f"{GENERATE} was declared for {argument:,} messages (its argument x-max-length), and ACESTEP_QUEUE_MAXSIZE is "
        f"{settings.queue_maxsize}. RabbitMQ never changes a queue's argument, and a policy only lowers it: the queue "
        f"must be made anew once it is empty. No request is lost this way:\n"
        f"1. start workers with ACESTEP_QUEUE_MAXSIZE={argument} and without ACESTEP_MANAGEMENT_URL, unless some still "
        f"run; while they run, let producers be refused:\n"
        f"{capacity_policy(0).as_command(vhost)}\n"
        f"2. when the queue is empty, stop the workers and remove it:\n"
        f"rabbitmqctl delete_queue -p {where} {GENERATE} --if-empty --if-unused\n"
        f"3. take the refusal away and start again; with ACESTEP_MANAGEMENT_URL this is the last time:\n"
        f"rabbitmqctl clear_policy -p {where} {CAPACITY}"
    )
