# SPDX-License-Identifier: Apache-2.0
"""Attempts of other workers that are renewed or silent, and those that end while storage does not answer."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from acestep_consumer.domain.job import Attempt
from acestep_consumer.execution import retries
from acestep_consumer.execution.retries import SILENT_LOOKS, RetryPolicy
from tests.support.fakes import FakeAttempts, FakeDelivery
from tests.support.waiting import eventually

Looks = Sequence[tuple[bytes, ...]]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "LOOK_S", 0)


async def looked(looks: Looks, ended: Callable[[int], bool] = lambda _: False) -> tuple[bool, int]:
    """Return whether anybody may have had the message, and how often it was asked whether it has ended."""
    asked = 0

    async def ask() -> bool:
        nonlocal asked
        asked += 1
        return ended(asked)

    policy = RetryPolicy(FakeAttempts(others=list(looks)), most=3)
    return await policy.others_over("song", "m1", delivered=False, ended=ask), asked


async def test_a_message_that_nobody_had_is_not_waited_for() -> None:
    assert await looked([()]) == (False, 0)


async def test_an_attempt_that_is_renewed_is_waited_for_however_long_it_takes() -> None:
    renewals = [(b"%d" % count,) for count in range(5 * SILENT_LOOKS)]
    assert await looked([*renewals, ()]) == (True, len(renewals))


async def test_an_attempt_that_is_not_renewed_is_given_up() -> None:
    assert await looked([(b"1",)]) == (True, SILENT_LOOKS)
    assert await looked([(b"1",)] * 9 + [(b"2",)]) == (True, 9 + SILENT_LOOKS)


async def test_a_message_that_has_ended_is_not_waited_for_any_longer() -> None:
    assert await looked([(b"1",)], ended=lambda asked: asked == 3) == (True, 3)


@dataclass
class SilentAttempts(FakeAttempts):
    """Remembers an excused attempt when ``answer`` is set."""

    answer: asyncio.Event = field(default_factory=asyncio.Event)

    async def excuse(self, attempt: Attempt) -> None:
        """Wait, then remember it."""
        await self.answer.wait()
        await super().excuse(attempt)


@asynccontextmanager
async def cancelled_attempt(
    attempts: FakeAttempts, *, most: int = 3, stale: bool = False
) -> AsyncIterator[asyncio.Task[None]]:
    """A first attempt that was cancelled just now."""
    began = asyncio.Event()

    async def run() -> None:
        delivery = FakeDelivery(message_id="song")
        async with RetryPolicy(attempts, most).attempt("song", delivery):
            delivery.stale = stale
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await began.wait()
    task.cancel()
    yield task
    task.cancel()
    await asyncio.wait({task})


async def test_silent_storage_holds_a_cancelled_attempt_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "EXCUSE_S", 0.01)
    async with cancelled_attempt(SilentAttempts()) as task:
        await eventually(task.done)
        assert task.cancelled()


@pytest.mark.parametrize(("most", "stale"), [(1, False), (3, True)], ids=["last", "lost"])
async def test_it_is_waited_for_where_the_record_decides_more_than_a_number(
    monkeypatch: pytest.MonkeyPatch, most: int, *, stale: bool
) -> None:
    """A last attempt that counts fails its message, and one whose message another worker has is waited for."""
    monkeypatch.setattr(retries, "EXCUSE_S", 0.0)
    attempts = SilentAttempts()
    async with cancelled_attempt(attempts, most=most, stale=stale) as task:
        assert not (await asyncio.wait({task}, timeout=0.1))[0]
        attempts.answer.set()
        await eventually(task.done)
        assert [attempt.number for attempt in attempts.excused] == [1]
