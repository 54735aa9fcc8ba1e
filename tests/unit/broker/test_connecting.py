# SPDX-License-Identifier: Apache-2.0
"""Addresses that lead to no broker: what answers there is told, with what to change."""

import asyncio
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import ConnectionLost
from acestep_consumer.broker.inspection import BrokerInspection
from acestep_consumer.broker.management import ManagementClient
from tests.support.answering import AMQP, HTTP, TLS_ALERT, answering
from tests.support.broker import broker_settings

PORT = "check that the port in ACESTEP_AMQP_URL is that of AMQP: 5672, or 5671 for amqps://"


@pytest.mark.parametrize(
    ("scheme", "answer", "said"),
    [
        ("amqp", TLS_ALERT, f"what answers does not speak AMQP 0.9.1; {PORT}"),
        ("amqp", HTTP, f"what answers does not speak AMQP 0.9.1; {PORT}"),
        (
            "amqps",
            AMQP,
            f"what answers does not speak TLS; {PORT}",
        ),
    ],
    ids=["TLS port", "HTTP port", "port without TLS"],
)
async def test_a_port_that_is_not_the_brokers_is_told(scheme: str, answer: bytes, said: str) -> None:
    async with answering(answer) as port:
        settings = broker_settings(f"{scheme}://a:b@127.0.0.1:{port}/")
        with pytest.raises(ConnectionLost) as lost:
            await BrokerInspection(settings, "doctor").connect()
        assert str(lost.value) == said
        with capture_logs() as logs, suppress(TimeoutError):
            async with asyncio.timeout(0.5), BrokerConnection(settings, "worker"):
                pass
        assert {entry["reason"] for entry in logs if "reason" in entry} == {said}


async def test_a_port_that_accepts_and_says_nothing_may_be_a_broker_that_starts() -> None:
    async with answering(None) as port:
        settings = broker_settings(f"amqp://a:b@127.0.0.1:{port}/")
        with pytest.raises(ConnectionLost) as lost:
            await BrokerInspection(settings, "doctor", timeout_s=0.2).connect()
        assert str(lost.value) == f"no AMQP greeting within 0.2 s; {PORT}"


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("http", "ACESTEP_MANAGEMENT_URL: no HTTP there; the port is 15672"),
        ("https", "ACESTEP_MANAGEMENT_URL: no TLS there; http:// is without"),
    ],
)
async def test_a_management_url_with_the_port_of_amqp_is_told(scheme: str, said: str) -> None:
    async with answering(AMQP) as port:
        settings = broker_settings("amqp://a:b@127.0.0.1/", management_url=f"{scheme}://127.0.0.1:{port}")
        async with ManagementClient(settings) as client:
            with pytest.raises(ConnectionLost) as lost:
                await client.tags()
        assert str(lost.value) == said
