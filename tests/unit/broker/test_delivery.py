# SPDX-License-Identifier: Apache-2.0
"""Which settlements end a job; the broker's part is in tests/integration/test_broker_consumer.py."""

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from pamqp.commands import Basic

from acestep_consumer.broker.delivery import AmqpDelivery
from acestep_consumer.domain.errors import Verdict


def delivery(*, forwarded: bool = True) -> AmqpDelivery:
    channel = SimpleNamespace(is_closed=False, basic_ack=AsyncMock(), basic_nack=AsyncMock())
    message: Any = SimpleNamespace(
        header=SimpleNamespace(properties=Basic.Properties()),
        body=b"{}",
        channel=channel,
        delivery_tag=1,
        redelivered=False,
        routing_key="generate",
        exchange="acestep.requests",
    )
    publisher = SimpleNamespace(forward=AsyncMock(return_value=forwarded), dead_letter=AsyncMock())
    return AmqpDelivery(message, cast("Any", publisher), AsyncMock())


@pytest.mark.parametrize(
    ("verdict", "done"), [(Verdict.ACK, True), (Verdict.DEAD_LETTER, True), (Verdict.REQUEUE, False)]
)
async def test_a_job_has_ended_unless_its_message_goes_back(verdict: Verdict, done: bool) -> None:  # noqa: FBT001 - a table of values
    held = delivery()
    assert not held.done
    await held.settle(verdict)
    assert (held.settled, held.done) == (True, done)


async def test_a_message_that_goes_to_another_queue_has_not_ended_here() -> None:
    forwarded, identified, kept = delivery(), delivery(), delivery(forwarded=False)
    assert await forwarded.forward("tier6")
    assert not await kept.forward("tier6")
    await identified.identify()
    for each in (forwarded, identified, kept):
        await each.settle(Verdict.ACK)
    assert (forwarded.done, identified.done, kept.done) == (False, False, True)
