# SPDX-License-Identifier: Apache-2.0
"""Make the topology stand on the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acestep_consumer.broker.faults import mapped

if TYPE_CHECKING:
    from aio_pika.abc import AbstractChannel

    from acestep_consumer.broker.topology import Topology


async def declare(channel: AbstractChannel, wanted: Topology) -> None:
    """Create what is missing; what is there as wanted stays untouched. Raises ``BrokerFault``."""
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
