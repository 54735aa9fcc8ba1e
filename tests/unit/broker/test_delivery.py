# SPDX-License-Identifier: Apache-2.0
"""Which settlements end a job; the broker's part is in tests/integration/test_broker_consumer.py."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from pamqp.commands import Basic

from acestep_consumer.broker.dead_letter import forwarded_properties, requeued_properties, returned_properties
from acestep_consumer.broker.delivery import AmqpDelivery, fingerprint
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


@pytest.mark.parametrize(("sent", "counts"), [(None, 0), (0, 0), (7, 7), (255, 9)])
def test_a_priority_is_one_of_the_queues_ten(sent: int | None, counts: int) -> None:
    held = delivery()
    held._properties = Basic.Properties(priority=sent)
    assert held.priority == counts


async def test_a_forwarded_message_names_the_tiers_that_it_has_seen() -> None:
    sent = Basic.Properties(headers={"x-mine": 1, "x-acestep-tiers": "tier2"})
    held = delivery()
    held._properties = sent
    assert held.visited_tiers == ("tier2",)
    await held.forward("tier6")
    (_, copy, _), _ = cast("Any", held._publisher).forward.call_args
    assert copy.headers == {"x-mine": 1, "x-acestep-tiers": "tier2,tier6"}
    assert "x-acestep-tiers" not in (requeued_properties(copy).headers or {})


@pytest.mark.parametrize(
    "other",
    [{"expiration": "200"}, {"priority": 5}, {"reply_to": "elsewhere"}, {"correlation_id": "c-2"}, {"message_id": "b"}],
    ids=lambda properties: next(iter(properties)),
)
def test_a_copy_within_the_same_second_has_a_fingerprint_of_its_own(other: dict[str, Any]) -> None:
    sent: dict[str, Any] = {"message_id": "a", "timestamp": datetime(2026, 3, 1, tzinfo=UTC)}
    assert fingerprint(b"{}", Basic.Properties(**sent)) != fingerprint(b"{}", Basic.Properties(**{**sent, **other}))


def test_a_fingerprint_is_the_same_wherever_the_message_goes() -> None:
    """Forwarded to a tier it has less time left; dead-lettered by the broker it has no expiration at all."""
    sent = Basic.Properties(message_id="a", priority=3, reply_to="r", correlation_id="c", expiration="60000")
    forwarded = forwarded_properties(sent, 20.0, redelivered=True)
    again = forwarded_properties(forwarded, 30.0, redelivered=True)
    assert (forwarded.expiration, again.expiration) == ("40000", "10000")
    dead = Basic.Properties(message_id="a", priority=3, reply_to="r", correlation_id="c")
    dead.headers = {"x-death": [{"reason": "maxlen", "queue": "acestep.generate", "original-expiration": "60000"}]}
    put_back = returned_properties(dead)
    found = {fingerprint(b"{}", each) for each in (sent, forwarded, again, dead, put_back)}
    assert len(found) == 1


def test_a_message_without_those_properties_has_the_fingerprint_that_earlier_versions_gave_it() -> None:
    """They are in manifests and in attempt records, and workers of two versions share a queue."""
    sent = Basic.Properties(message_id="a", timestamp=datetime(2026, 3, 1, tzinfo=UTC))
    assert fingerprint(b"{}", sent) == "0be5a024a0712ab675e2909222e2c5c3"
