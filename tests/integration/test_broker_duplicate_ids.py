# SPDX-License-Identifier: Apache-2.0
"""Two workers with one id: both say so, once, and no worker takes itself for another."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from structlog.testing import capture_logs

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.duplicate_ids import DuplicateIdCheck
from acestep_consumer.broker.topology import CONTROL_LOG
from tests.support.broker import Peer, broker_settings
from tests.support.waiting import eventually


def warnings(logs: list[Any]) -> list[str]:
    return [line["worker"] for line in logs if "same id" in line["event"]]


@asynccontextmanager
async def three_connections(url: str) -> AsyncIterator[tuple[BrokerConnection, BrokerConnection, BrokerConnection]]:
    settings = broker_settings(url)
    async with (
        BrokerConnection(settings, "first") as first,
        BrokerConnection(settings, "second") as second,
        BrokerConnection(settings, "third") as third,
    ):
        yield first, second, third


async def test_both_workers_with_one_id_warn_and_no_other(amqp_url: str) -> None:
    async with three_connections(amqp_url) as (first, second, third):
        with capture_logs() as logs:
            await DuplicateIdCheck(third, "gpu-02").start()
            await DuplicateIdCheck(first, "gpu-01").start()
            await DuplicateIdCheck(second, "gpu-01").start()
            await eventually(lambda: len(warnings(logs)) == 2)
        assert warnings(logs) == ["gpu-01", "gpu-01"]
        assert all("ACESTEP_WORKER_ID" in line["event"] for line in logs if "same id" in line["event"])


async def test_a_worker_that_reconnects_is_no_other_worker_and_is_warned_of_once(amqp_url: str) -> None:
    async with three_connections(amqp_url) as (first, second, third):
        with capture_logs() as logs:
            await DuplicateIdCheck(first, "gpu-01").start()
            first.reconnect("the test says so")
            await first.channel()
            await DuplicateIdCheck(second, "gpu-01").start()
            await eventually(lambda: len(warnings(logs)) == 2)
            second.reconnect("the test says so")
            await second.channel()
            # Its question comes after all of the second's: two warnings more, and it warns of both of them itself.
            await DuplicateIdCheck(third, "gpu-01").start()
            await eventually(lambda: len(warnings(logs)) >= 6)
        assert len(warnings(logs)) == 6


async def test_the_stream_of_cancellations_does_not_get_the_questions(amqp_url: str) -> None:
    async with BrokerConnection(broker_settings(amqp_url), "first") as first, Peer(amqp_url) as peer:
        before = await peer.ready(CONTROL_LOG)
        await DuplicateIdCheck(first, "gpu-01").start()
        assert await peer.ready(CONTROL_LOG) == before
