# SPDX-License-Identifier: Apache-2.0
"""Which messages a cancellation is meant for, and when it is forgotten; without a broker."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from acestep_consumer.broker import cancellations as module
from acestep_consumer.broker.cancellations import RETENTION_S, CancellationLog
from acestep_consumer.broker.connection import BrokerConnection
from tests.support.broker import broker_settings

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


class Clock:
    """Both clocks of a machine."""

    def __init__(self) -> None:
        self.now_s = NOON.timestamp()
        self.up_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def elapsed(self) -> float:
        return self.up_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def known(clock: Clock) -> CancellationLog:
    return CancellationLog(BrokerConnection(broker_settings("amqp://localhost/"), "worker"), clock, clock.elapsed)


@pytest.mark.parametrize(
    ("cancelled", "sent", "asked"),
    [
        (NOON, NOON - SECOND, True),
        (NOON, NOON, True),
        (NOON, NOON + timedelta(milliseconds=999), True),
        (NOON, NOON + SECOND, False),
        (NOON - timedelta(days=1), NOON, False),
        (NOON, None, True),
        (None, NOON, True),
        (None, None, True),
    ],
)
async def test_a_cancellation_of_an_earlier_second_is_not_meant_for_the_message(
    known: CancellationLog,
    cancelled: datetime | None,
    sent: datetime | None,
    asked: bool,  # noqa: FBT001 - the expectation
) -> None:
    known._note("t1", cancelled)
    assert known.is_cancelled("t1", sent) is asked
    assert not known.is_cancelled("t2", sent)


async def test_the_latest_of_two_counts_in_whatever_order_they_come(known: CancellationLog) -> None:
    known._note("t1", NOON)
    known._note("t1", NOON - 10 * SECOND)
    assert known.is_cancelled("t1", NOON)
    known._note("t1", NOON + 10 * SECOND)
    assert known.is_cancelled("t1", NOON + 10 * SECOND)


async def test_one_without_a_time_counts_until_a_later_one_has_one(known: CancellationLog) -> None:
    known._note("t1", NOON)
    known._note("t1", None)
    assert known.is_cancelled("t1", NOON + SECOND)
    known._note("t1", NOON)
    assert not known.is_cancelled("t1", NOON + SECOND)


@pytest.mark.parametrize("sent", [NOON, None])
async def test_what_is_older_than_the_stream_keeps_is_forgotten(
    known: CancellationLog, clock: Clock, sent: datetime | None
) -> None:
    known._note("t1", sent)
    clock.now_s += RETENTION_S + 1
    clock.up_s += RETENTION_S + 1
    assert not known.is_cancelled("t1", None)
    known._note("t2", None)
    assert set(known._known) == {"t2"}


@pytest.mark.parametrize("jump_s", [-10 * RETENTION_S, 10 * RETENTION_S])
async def test_a_clock_that_is_set_makes_no_cancellation_old(
    known: CancellationLog, clock: Clock, jump_s: float
) -> None:
    """A machine without a battery starts in 1970, until it has asked for the time."""
    known._note("t1", NOON)
    clock.now_s += jump_s
    known._note("t2", None)
    assert known.is_cancelled("t1", NOON)


async def test_what_was_too_old_when_it_was_read_is_not_kept(known: CancellationLog) -> None:
    known._note("t1", NOON - timedelta(days=8))
    assert not known._known


async def test_a_flood_pushes_out_what_was_heard_first(known: CancellationLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KNOWN", 3)
    for number in range(5):
        known._note(f"t{number}", NOON)
    known._note("t2", NOON)
    known._note("t5", NOON)
    assert list(known._known) == ["t4", "t2", "t5"]


@pytest.mark.parametrize("task_id", ["", "a b", "a.b", "../a", "a\n", "ä", "x" * 129, "#", "*"])
async def test_what_is_no_task_id_is_not_kept(known: CancellationLog, task_id: str) -> None:
    known._note(task_id, NOON)
    assert not known._known


async def test_waiting_ends_with_a_cancellation_that_is_meant_for_the_message(known: CancellationLog) -> None:
    meant = [asyncio.create_task(known.wait("t1", NOON)) for _ in range(2)]
    later = asyncio.create_task(known.wait("t1", NOON + SECOND))
    other = asyncio.create_task(known.wait("t2", NOON))
    await asyncio.sleep(0)
    known._note("t1", NOON)
    await asyncio.wait_for(asyncio.gather(*meant), 5)
    assert not later.done()
    assert not other.done()
    known._note("t1", NOON + SECOND)
    await asyncio.wait_for(later, 5)
    other.cancel()
    await asyncio.wait({other})
    assert not known._waiting


async def test_who_comes_after_the_cancellation_does_not_wait(known: CancellationLog) -> None:
    known._note("t1", NOON)
    await asyncio.wait_for(known.wait("t1", NOON), 5)
