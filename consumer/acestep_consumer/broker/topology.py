# SPDX-License-Identifier: Apache-2.0
"""The topology as plain data: exchanges, queues, bindings, and the policy that holds the limit.

The same data declares the objects at every connect and prints the definitions file that operators import.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from acestep_consumer.broker.errors import mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from aio_pika.abc import AbstractChannel
    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel
    from pydantic import JsonValue

    from acestep_consumer.config.settings import BrokerSettings

REQUESTS = "acestep.requests"
GENERATE = "acestep.generate"
EVENTS = "acestep.events"
UNROUTED = "acestep.events.unrouted"
CONTROL = "acestep.control"
DEAD_LETTER = "acestep.dead-letter"
NOTICES = "acestep.dead-letter.notices"
# Copies of requests that had neither a task id nor a message id, with a message id. Consumed before the request queue.
IDENTIFIED = "acestep.requests.identified"
CONTROL_LOG = "acestep.control.log"

# Routing key of requests.
ROUTING_KEY = "generate"

# First words of routing keys of the control exchange. STATUS: every worker is to announce itself.
CANCEL = "cancel"
SYNC = "sync"
STATUS = "status"

CAPACITY = "acestep-capacity"
# Of one call on a channel.
RPC_TIMEOUT_S = 10.0
# Prefix of throw-away queues on which the limit is measured.
PROBES = f"{GENERATE}.probe-"

# Prefix of the tier queues, in which forwarded requests wait.
TIERS = f"{GENERATE}."
# With a tier's name, a routing key of the control exchange: makes the workers of the tier look at its queue.
TIER = "tier"

MAX_PRIORITY = 9

# Longer than a request may sensibly wait. RabbitMQ deletes a stream's old segments whole, when it begins a new one.
CONTROL_LOG_DAYS = 7
# Some 18,000 cancellations, which a starting worker reads in 2 s, and in less than 10 s on a busy machine.
CONTROL_LOG_BYTES = 4 << 20
CONTROL_LOG_SEGMENT_BYTES = 512 << 10
UNROUTED_KEPT = 10_000

# RabbitMQ 4 drops a message from a quorum queue at its 21st delivery, without a terminal event. The worker counts
# attempts itself, so the broker's limit is set out of reach. Not to -1: RabbitMQ 3.10 takes that for a limit already
# exceeded and drops the message at its first requeue.
UNREACHED_DELIVERY_LIMIT = 1_000_000

Kind = Literal["classic", "quorum"]
Arguments = dict[str, str | int]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable exchange."""

    name: str
    type: Literal["topic", "fanout"]
    arguments: Arguments = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue."""

    name: str
    arguments: Arguments

    def with_limit(self, limit: int | None) -> Queue:
        """Return the same queue with another limit as its argument; None: without one."""
        others = {name: value for name, value in self.arguments.items() if name != "x-max-length"}
        return Queue(self.name, others if limit is None else {**others, "x-max-length": limit})


@dataclass(frozen=True, slots=True)
class Binding:
    """Routes messages of ``exchange`` that match ``routing_key`` to ``queue``."""

    exchange: str
    queue: str
    routing_key: str


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy: arguments that the broker applies to queues by name, and that can be changed at any time."""

    name: str
    pattern: str
    definition: Arguments
    # Above the default of 0: of the policies that match a queue, RabbitMQ applies the one with the highest priority.
    priority: int = 10
    apply_to: str = "queues"

    def as_body(self) -> dict[str, JsonValue]:
        """Return the body that the management API takes."""
        return {
            "pattern": self.pattern,
            "apply-to": self.apply_to,
            "priority": self.priority,
            "definition": dict(self.definition),
        }

    def as_command(self, vhost: str) -> str:
        """Return the ``rabbitmqctl`` command that sets it."""
        options = ["-p", vhost, "--priority", str(self.priority), "--apply-to", self.apply_to]
        return shlex.join(["rabbitmqctl", "set_policy", *options, self.name, self.pattern, json.dumps(self.definition)])


@dataclass(frozen=True, slots=True)
class Topology:
    """All objects, each kind in the order of declaration."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]
    policies: tuple[Policy, ...] = ()

    def without(self, queue: str) -> Topology:
        """Return the topology without one queue."""
        return replace(
            self,
            queues=tuple(each for each in self.queues if each.name != queue),
            bindings=tuple(each for each in self.bindings if each.queue != queue),
        )

    def tier_queue(self, tier: str) -> Queue:
        """Return the queue of a tier: like the producers' queue, under another name."""
        requests = next(queue for queue in self.queues if queue.name == GENERATE)
        return replace(requests, name=tier_queue(tier))

    def with_tiers(self, tiers: Iterable[str]) -> Topology:
        """Return the topology with the queues of these tiers added."""
        return replace(self, queues=(*self.queues, *map(self.tier_queue, tiers)))

    def as_definitions(self, vhost: str = "/") -> dict[str, list[dict[str, JsonValue]]]:
        """Return the JSON that ``rabbitmqctl import_definitions`` and the management API import."""
        definitions: dict[str, list[dict[str, JsonValue]]] = {
            "exchanges": [_exchange_definition(exchange, vhost) for exchange in self.exchanges],
            "queues": [_queue_definition(queue, vhost) for queue in self.queues],
            "bindings": [_binding_definition(binding, vhost) for binding in self.bindings],
        }
        if self.policies:
            policies = [{"vhost": vhost, "name": policy.name, **policy.as_body()} for policy in self.policies]
            definitions["policies"] = policies
        return definitions


def capacity_policy(limit: int) -> Policy:
    """Return the policy under which ``limit`` requests may wait and the next publish is refused."""
    return Policy(CAPACITY, "^acestep[.]generate($|[.])", {"max-length": limit, "overflow": "reject-publish"})


def tier_queue(tier: str) -> str:
    """Return the name of the queue of a tier."""
    return f"{TIERS}{tier}"


def tier_of(queue: str) -> str | None:
    """Return the tier whose queue has this name; None: it is no tier queue."""
    return queue.removeprefix(TIERS) if queue.startswith(TIERS) and not queue.startswith(PROBES) else None


def topology(settings: BrokerSettings) -> Topology:
    """Return the objects that a worker declares, for the queue type and the limit in ``settings``.

    A policy holds the limit where the worker can set one, else the queue's argument.
    """
    if settings.management_url is None:
        return topology_with(settings, settings.queue_maxsize)
    return replace(topology_with(settings, None), policies=(capacity_policy(settings.queue_maxsize),))


def topology_with(settings: BrokerSettings, limit: int | None) -> Topology:
    """Return the objects with ``limit`` as the request queue's argument; None: without one.

    The exchange that a queue dead-letters to comes before the queue: messages are lost while it is missing.
    """
    kind = settings.queue_type
    return Topology(
        exchanges=(
            Exchange(DEAD_LETTER, "fanout"),
            Exchange(UNROUTED, "fanout"),
            Exchange(EVENTS, "topic", {"alternate-exchange": UNROUTED}),
            Exchange(CONTROL, "topic"),
            Exchange(REQUESTS, "topic"),
        ),
        queues=(
            Queue(DEAD_LETTER, _durable(kind)),
            # Without a limit, like the queue before it. A limit could only drop a notice, and then a producer waits for
            # ever, or refuse it, and then a worker's dead letter counts as unpublished and is sent twice. A running
            # worker keeps it empty. Without workers it grows with expired requests, until RabbitMQ's disk limit stops
            # producers.
            Queue(NOTICES, _durable(kind)),
            Queue(CONTROL_LOG, _stream()),
            Queue(UNROUTED, {**_durable(kind), "x-max-length": UNROUTED_KEPT, "x-overflow": "drop-head"}),
            Queue(GENERATE, {**_durable(kind), **_limited(kind, limit)}),
            # Without a limit: workers publish here what they have consumed, one message for each that they then ack.
            Queue(IDENTIFIED, {**_durable(kind), "x-dead-letter-exchange": DEAD_LETTER}),
        ),
        bindings=(
            Binding(DEAD_LETTER, DEAD_LETTER, ""),
            Binding(DEAD_LETTER, NOTICES, ""),
            Binding(CONTROL, CONTROL_LOG, f"{CANCEL}.*"),
            Binding(CONTROL, CONTROL_LOG, f"{SYNC}.*"),
            Binding(UNROUTED, UNROUTED, ""),
            Binding(REQUESTS, GENERATE, f"{ROUTING_KEY}.#"),
        ),
    )


async def consume_own_queue(
    channel: Channel, on_message: Callable[[DeliveredMessage], Coroutine[None, None, None]]
) -> str:
    """Consume a new queue of this connection alone, without acks, and return its name.

    It is not named by the broker: the login's permissions may cover names that begin with ``acestep.`` alone.
    """
    queue = f"{CONTROL}.{uuid4().hex}"
    await channel.queue_declare(queue, exclusive=True, auto_delete=True, timeout=RPC_TIMEOUT_S)
    await channel.basic_consume(queue, on_message, no_ack=True, timeout=RPC_TIMEOUT_S)
    return queue


def _durable(kind: Kind) -> Arguments:
    """Name the type always, because a virtual host may have another default."""
    if kind == "classic":
        return {"x-queue-type": "classic"}
    return {"x-queue-type": "quorum", "x-delivery-limit": UNREACHED_DELIVERY_LIMIT}


def _stream() -> Arguments:
    """A stream keeps messages that were read, for a time and up to a size."""
    return {
        "x-queue-type": "stream",
        "x-max-age": f"{CONTROL_LOG_DAYS}D",
        "x-max-length-bytes": CONTROL_LOG_BYTES,
        "x-stream-max-segment-size-bytes": CONTROL_LOG_SEGMENT_BYTES,
    }


def _limited(kind: Kind, limit: int | None) -> Arguments:
    arguments: Arguments = {"x-overflow": "reject-publish", "x-dead-letter-exchange": DEAD_LETTER}
    if limit is not None:
        arguments["x-max-length"] = limit
    if kind == "classic":
        # Quorum queues have priorities without this argument, and refuse it.
        return {**arguments, "x-max-priority": MAX_PRIORITY}
    return {**arguments, "x-dead-letter-strategy": "at-least-once"}


def _exchange_definition(exchange: Exchange, vhost: str) -> dict[str, JsonValue]:
    return {
        "name": exchange.name,
        "vhost": vhost,
        "type": exchange.type,
        "durable": True,
        "auto_delete": False,
        "internal": False,
        "arguments": dict(exchange.arguments),
    }


def _queue_definition(queue: Queue, vhost: str) -> dict[str, JsonValue]:
    return {
        "name": queue.name,
        "vhost": vhost,
        "durable": True,
        "auto_delete": False,
        "arguments": dict(queue.arguments),
    }


def _binding_definition(binding: Binding, vhost: str) -> dict[str, JsonValue]:
    return {
        "source": binding.exchange,
        "vhost": vhost,
        "destination": binding.queue,
        "destination_type": "queue",
        "routing_key": binding.routing_key,
        "arguments": {},
    }


async def declare(channel: AbstractChannel, wanted: Topology) -> None:
    """Declare the objects; existing ones that are the same are not changed. Raises ``BrokerError``."""
    with mapped():
        for exchange in wanted.exchanges:
            await channel.declare_exchange(
                exchange.name, exchange.type, durable=True, arguments=dict(exchange.arguments)
            )
        for queue in wanted.queues:
            await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
        underlay = await channel.get_underlay_channel()
        for binding in wanted.bindings:
            await underlay.queue_bind(binding.queue, binding.exchange, binding.routing_key)


def connection_name(worker_id: str, use: str) -> str:
    """Return the name on the broker of one of a worker's connections, such as ``acestep-consumer gpu-0 consume``."""
    return f"acestep-consumer {worker_id} {use}"


def consumer_of(name: str) -> str | None:
    """Return the id of the worker whose consuming connection has this name; None: it is no such connection."""
    before, after = connection_name("\0", "consume").split("\0")
    return name[len(before) : -len(after)] if name.startswith(before) and name.endswith(after) else None
