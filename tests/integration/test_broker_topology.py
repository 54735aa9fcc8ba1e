# SPDX-License-Identifier: Apache-2.0
"""The topology on a real broker: declared once or often, imported from definitions, full at exactly the limit."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from aio_pika.exceptions import DeliveryError

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.topology import GENERATE, topology
from tests.support.broker import Peer, broker_settings

if TYPE_CHECKING:
    from tests.support.servers import ManagementApi

pytestmark = pytest.mark.broker_versions


def standing(management: ManagementApi, vhost: str) -> dict[str, Any]:
    """What stands on the virtual host, without the exchanges that every one has, in the form of definitions."""
    found = management.call("GET", f"/api/definitions/{quote(vhost, safe='')}")
    return {
        kind: sorted((in_our_form(kind, {**entry, "vhost": vhost}) for entry in found[kind]), key=by_text)
        for kind in ("exchanges", "queues", "bindings")
    }


def in_our_form(kind: str, entry: dict[str, Any]) -> dict[str, Any]:
    """RabbitMQ 4.3 exports a queue's type twice, and of the exchanges only the internal ones as that."""
    if kind == "queues":
        return {name: value for name, value in entry.items() if name != "type"}
    return {"internal": False, **entry} if kind == "exchanges" else entry


def by_text(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True)


def wanted(vhost: str, **values: Any) -> dict[str, Any]:
    definitions = topology(broker_settings("amqp://localhost/", **values)).as_definitions(vhost)
    return {kind: sorted(entries, key=by_text) for kind, entries in definitions.items()}


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_declaring_twice_leaves_exactly_the_topology(
    amqp_url: str, amqp_vhost: str, management: ManagementApi, queue_type: str
) -> None:
    settings = broker_settings(amqp_url, queue_type=queue_type, queue_maxsize=7)
    async with BrokerConnection(settings, "first"), BrokerConnection(settings, "second"):
        pass
    found = await asyncio.to_thread(standing, management, amqp_vhost)
    assert found == wanted(amqp_vhost, queue_type=queue_type, queue_maxsize=7)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_a_worker_starts_on_imported_definitions(
    amqp_url: str, amqp_vhost: str, management: ManagementApi, queue_type: str
) -> None:
    settings = broker_settings(amqp_url, queue_type=queue_type)
    definitions = {
        kind: [{key: value for key, value in entry.items() if key != "vhost"} for entry in entries]
        for kind, entries in topology(settings).as_definitions(amqp_vhost).items()
    }
    path = f"/api/definitions/{quote(amqp_vhost, safe='')}"
    await asyncio.to_thread(management.call, "POST", path, definitions)
    async with BrokerConnection(settings, "worker") as connection:
        assert connection.is_up


async def test_a_full_classic_queue_refuses_exactly_what_is_over_the_limit(amqp_url: str) -> None:
    async with BrokerConnection(broker_settings(amqp_url, queue_maxsize=20), "worker"), Peer(amqp_url) as producer:
        sent = await asyncio.gather(*(producer.request(b"{}") for _ in range(50)), return_exceptions=True)
        refused = [outcome for outcome in sent if outcome is not None]
        assert len(refused) == 30
        assert all(isinstance(outcome, DeliveryError) for outcome in refused)
        assert await producer.ready(GENERATE) == 20
        await producer.take(GENERATE)
        await producer.request(b"{}")


async def test_a_queue_with_another_limit_is_an_error_that_names_the_setting(amqp_url: str) -> None:
    async with BrokerConnection(broker_settings(amqp_url, queue_maxsize=20), "worker"):
        pass
    with pytest.raises(BrokerRefused, match="ACESTEP_QUEUE_MAXSIZE"):
        async with BrokerConnection(broker_settings(amqp_url, queue_maxsize=21), "worker"):
            pass
