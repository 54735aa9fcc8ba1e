# SPDX-License-Identifier: Apache-2.0
"""What stands on the broker, as plain data: exchanges, queues, bindings.

The same data declares the objects at every connect and prints the definitions file that operators import.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pydantic import JsonValue

    from consumer.settings import BrokerSettings

REQUESTS = "acestep.requests"
GENERATE = "acestep.generate"
EVENTS = "acestep.events"
UNROUTED = "acestep.events.unrouted"
CONTROL = "acestep.control"
DEAD_LETTER = "acestep.dead-letter"

MAX_PRIORITY = 9
UNROUTED_KEPT = 10_000

# RabbitMQ 4 drops a message from a quorum queue at its 21st delivery, and no terminal event would tell. The worker
# counts attempts itself, so the broker's limit is set out of reach. Not by -1: RabbitMQ 3.10 reads that as a limit
# already exceeded and drops the message at its first requeue.
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


@dataclass(frozen=True, slots=True)
class Binding:
    """Messages of ``exchange`` that match ``routing_key`` go to ``queue``."""

    exchange: str
    queue: str
    routing_key: str


@dataclass(frozen=True, slots=True)
class Topology:
    """All objects, each kind in the order of declaration."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]

    def as_definitions(self, vhost: str = "/") -> dict[str, list[dict[str, JsonValue]]]:
        """Return the JSON that ``rabbitmqctl import_definitions`` and the management API take."""
        return {
            "exchanges": [_exchange_definition(exchange, vhost) for exchange in self.exchanges],
            "queues": [_queue_definition(queue, vhost) for queue in self.queues],
            "bindings": [_binding_definition(binding, vhost) for binding in self.bindings],
        }


def topology(settings: BrokerSettings) -> Topology:
    """Return the objects that the worker needs, for the queue type and the length limit of ``settings``.

    What a queue dead-letters to comes before the queue: a message that finds its target missing is lost.
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
            Queue(DEAD_LETTER, _lasting(kind)),
            Queue(UNROUTED, {**_lasting(kind), "x-max-length": UNROUTED_KEPT, "x-overflow": "drop-head"}),
            Queue(GENERATE, {**_lasting(kind), **_bounded(kind, settings.queue_maxsize)}),
        ),
        bindings=(
            Binding(DEAD_LETTER, DEAD_LETTER, ""),
            Binding(UNROUTED, UNROUTED, ""),
            Binding(REQUESTS, GENERATE, "generate.#"),
        ),
    )


def _lasting(kind: Kind) -> Arguments:
    """The type is always named: a virtual host may have another default."""
    if kind == "classic":
        return {"x-queue-type": "classic"}
    return {"x-queue-type": "quorum", "x-delivery-limit": UNREACHED_DELIVERY_LIMIT}


def _bounded(kind: Kind, maxsize: int) -> Arguments:
    arguments: Arguments = {
        "x-max-length": maxsize,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": DEAD_LETTER,
    }
    if kind == "classic":
        # Quorum queues know priorities without being asked, and refuse this argument.
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
