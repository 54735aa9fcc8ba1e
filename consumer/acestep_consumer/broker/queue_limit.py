# SPDX-License-Identifier: Apache-2.0
"""The limit of the request queue: set and measured before the first request is taken, so that it is never another one.

A limit can be set in two places. As the queue's argument ``x-max-length`` it needs nothing but AMQP, and can never be
changed. As a policy it can be changed at any time, with all messages kept, but not over AMQP. Where there are both, the
smaller one counts.

- With ``ACESTEP_MANAGEMENT_URL`` the queue is declared without the argument, and each start sets the policy.
- Without it, a new queue gets the argument. On an existing queue, somebody may have set the limit otherwise.

Either way the limit in force is then measured. AMQP cannot read a policy, but it also applies to a throw-away queue
that its pattern matches: that queue is sent one message more than the limit, and must keep exactly the limit. A
mismatch stops the start, with the command that corrects it.
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

# Of a larger limit no more than this is measured: so many messages take a second, and more would delay the start.
MAX_MEASURED = 20_000
_CALL_TIMEOUT_S = 20.0
_TRANSIENT = 1
_OTHER_LENGTH = re.compile(
    r"inequivalent arg 'x-max-length' for queue '([^']*)'.*current is (?:the value )?'?(none|\d+)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class LimitInForce:
    """The limit in force.

    Attributes:
        argument: the queue's own argument; None: it has none.
        kept: how many messages a queue kept, of one more than wanted.
        objection: why a worker would not start, and the commands that correct it; None: it would.
    """

    argument: int | None
    kept: int
    objection: str | None


async def ensure_limit(connection: AbstractConnection, settings: BrokerSettings) -> Topology:
    """Make ``settings.queue_maxsize`` the limit of waiting requests, and return the topology as it is then.

    Raises:
        BrokerRefused: the limit is another one, and a person has to act; the text holds the commands.
        ConnectionLost: the broker or its management API is unreachable.
    """
    if settings.management_url is not None:
        async with ManagementClient(settings) as management:
            await management.set_limit(settings.queue_maxsize)
    limit = await _declare_with_limit(connection, settings)
    _check(settings, limit, await _count_kept(connection, settings.queue_maxsize, limit))
    return topology_with(settings, limit)


async def measure(connection: AbstractConnection, settings: BrokerSettings) -> LimitInForce:
    """Measure the limit in force without changing it. The request queue must exist.

    Raises:
        BrokerRefused: the queue differs in more than its limit, or the user lacks a permission.
        ConnectionLost: the broker is unreachable.
    """
    argument = await _declare_with_limit(connection, settings, only=GENERATE)
    kept = await _count_kept(connection, settings.queue_maxsize, argument)
    try:
        _check(settings, argument, kept)
    except BrokerRefused as refusal:
        return LimitInForce(argument, kept, str(refusal))
    return LimitInForce(argument, kept, None)


async def _declare_with_limit(
    connection: AbstractConnection, settings: BrokerSettings, only: str | None = None
) -> int | None:
    """Declare the objects, or one queue alone, and return the limit that the request queue has as its argument.

    Existing objects are not changed: a queue keeps the argument that it was declared with.
    """
    limit = None if settings.management_url else settings.queue_maxsize
    try:
        await _declare(connection, _part(topology_with(settings, limit), only))
    except BrokerRefused as refusal:
        limit = declared_limit(refusal, GENERATE)
        await _declare(connection, _part(topology_with(settings, limit), only))
    return limit


def declared_limit(refusal: BrokerRefused, queue: str) -> int | None:
    """Return the limit that the queue was declared with, if the refusal is about that; else raise the refusal."""
    found = _OTHER_LENGTH.search(str(refusal))
    if found is None or found[1] != queue:
        raise refusal
    return None if found[2] == "none" else int(found[2])


def _part(whole: Topology, only: str | None) -> Topology:
    if only is None:
        # The stream does not matter for the limit, and may be the last to be available after a crash of the broker.
        return whole.without(CONTROL_LOG)
    return Topology((), tuple(queue for queue in whole.queues if queue.name == only), ())


async def _declare(connection: AbstractConnection, wanted: Topology) -> None:
    """Declare on a channel of its own, which the broker closes over a refusal."""
    with mapped():
        channel = await connection.channel()
    await declare(channel, wanted)
    with mapped():
        await channel.close()


async def _count_kept(connection: AbstractConnection, wanted: int, argument: int | None) -> int:
    """Return how many messages a queue with this argument keeps, of one more than ``wanted``.

    The queue is a classic one, whatever the real one is: on classic queues the limit is exact.
    """
    name = f"{PROBES}{uuid4().hex}"
    # Nothing is dead-lettered here: the argument makes the broker refuse a user without write permission on the default
    # exchange, by name. Else the publishes would close the connection.
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
        await _send(channel, name, min(wanted, MAX_MEASURED) + 1)
        # A get waits for the messages before it; a question for their number would be answered too early.
        first = await channel.basic_get(name, no_ack=True, timeout=_CALL_TIMEOUT_S)
        await channel.queue_delete(name, timeout=_CALL_TIMEOUT_S)
        await opened.close()
    return 0 if first.message_count is None else first.message_count + 1


async def _send(channel: Channel, queue: str, count: int) -> None:
    for _ in range(count):
        properties = Basic.Properties(delivery_mode=_TRANSIENT)
        await channel.basic_publish(b"", routing_key=queue, properties=properties, wait=False)


def _check(settings: BrokerSettings, argument: int | None, kept: int) -> None:
    """Raise ``BrokerRefused`` where the measured limit is not the wanted one."""
    wanted = settings.queue_maxsize
    if argument is not None and argument < wanted:
        raise BrokerRefused(_how_to_recreate(settings, argument))
    if kept <= MAX_MEASURED or wanted <= MAX_MEASURED:
        if kept != wanted:
            raise BrokerRefused(_how_to_set(settings, argument, kept))
    elif settings.management_url is None and argument != wanted:
        raise BrokerRefused(
            f"ACESTEP_QUEUE_MAXSIZE is {wanted}, and {GENERATE} was declared otherwise. A limit above "
            f"{MAX_MEASURED:,} cannot be measured over AMQP: set ACESTEP_MANAGEMENT_URL, so that the worker sets it"
        )


def _how_to_set(settings: BrokerSettings, argument: int | None, kept: int) -> str:
    wanted, vhost = settings.queue_maxsize, vhost_of(settings)
    if kept < wanted:
        problem = f"a policy lets {GENERATE} hold only {kept:,} messages"
    elif argument is None:
        problem = f"no policy limits {GENERATE} to {wanted:,} messages"
    else:
        problem = f"{GENERATE} was declared for {argument:,} messages, and no policy lowers that"
    problem = f"{problem}, and ACESTEP_QUEUE_MAXSIZE is {wanted}"
    if settings.management_url is None:
        return (
            f"{problem}. The messages stay where they are when you set ACESTEP_MANAGEMENT_URL, with which the worker "
            f"sets the policy itself, or run this and start again:\n{capacity_policy(wanted).as_command(vhost)}"
        )
    return (
        f"{problem}, although the policy {CAPACITY} is set: another policy or an operator policy counts for queues "
        f"whose names begin with {GENERATE}; see rabbitmqctl list_policies and rabbitmqctl list_operator_policies"
    )


def _how_to_recreate(settings: BrokerSettings, argument: int) -> str:
    vhost = vhost_of(settings)
    where = shlex.quote(vhost)
    return (
        f"{GENERATE} was declared for {argument:,} messages (its argument x-max-length), and ACESTEP_QUEUE_MAXSIZE is "
        f"{settings.queue_maxsize}. RabbitMQ never changes a queue's argument, and a policy only lowers it: the queue "
        f"must be deleted and declared again once it is empty. No request is lost this way:\n"
        f"1. start workers with ACESTEP_QUEUE_MAXSIZE={argument} and without ACESTEP_MANAGEMENT_URL, unless some still "
        f"run; meanwhile, let the queue refuse new requests:\n"
        f"{capacity_policy(0).as_command(vhost)}\n"
        f"2. when the queue is empty, stop the workers and remove it:\n"
        f"rabbitmqctl delete_queue -p {where} {GENERATE} --if-empty --if-unused\n"
        f"3. clear the policy and start again; with ACESTEP_MANAGEMENT_URL this is never needed again:\n"
        f"rabbitmqctl clear_policy -p {where} {CAPACITY}"
    )
