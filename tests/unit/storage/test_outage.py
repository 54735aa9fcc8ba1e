# SPDX-License-Identifier: Apache-2.0
"""Outages of the storage: which calls are retried, and what is reported."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from acestep_consumer.domain.errors import InputUnreadable, ManifestUnreadable, StorageUnavailable
from acestep_consumer.storage.outage import OutageGate, watch
from tests.support.waiting import eventually


class Storage:
    """Fails so many times, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    async def read(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise StorageUnavailable("nobody there")
        return "here"


async def nobody_answers() -> None:
    raise StorageUnavailable("nobody there")


async def answers() -> None:
    pass


def gate(changes: list[bool], ready: Callable[[], Awaitable[None]] = nobody_answers) -> OutageGate:
    async def on_change(away: bool) -> None:  # noqa: FBT001 - a callback's one argument
        changes.append(away)

    return OutageGate(on_change, ready, first_s=0.001, last_s=0.002, one_object_s=0.05)


async def test_a_call_is_retried_until_storage_is_back_and_both_changes_are_reported_once() -> None:
    changes: list[bool] = []
    storage = Storage(failures=5)
    assert await gate(changes).retry(lambda: storage.read()) == "here"  # noqa: PLW0108 - as its callers write it
    assert (storage.calls, changes) == (6, [True, False])


async def test_a_damaged_object_is_no_outage_and_its_error_is_raised_in_the_end() -> None:
    """Whoever may name objects as inputs could stop the worker otherwise."""
    changes: list[bool] = []
    damaged = Storage(failures=10**9)
    with pytest.raises(StorageUnavailable):
        await gate(changes, answers).retry(damaged.read, reads=True)
    assert damaged.calls > 1
    assert changes == []


async def test_a_read_that_fails_while_storage_answers_nothing_waits_for_the_end_of_the_outage() -> None:
    changes: list[bool] = []
    storage = Storage(failures=200)
    assert await gate(changes).retry(storage.read, reads=True) == "here"
    assert changes == [True, False]


async def test_a_write_that_fails_is_an_outage_though_reads_are_answered() -> None:
    changes: list[bool] = []
    assert await gate(changes, answers).retry(Storage(failures=3).read) == "here"
    assert changes == [True, False]


async def test_storage_that_answers_is_no_change() -> None:
    changes: list[bool] = []
    assert await gate(changes).retry(Storage(failures=0).read) == "here"
    assert changes == []


@pytest.mark.parametrize(
    "error", [ManifestUnreadable("not a manifest"), InputUnreadable("no audio"), ValueError("bug")]
)
async def test_what_waiting_cannot_change_is_raised_at_once(error: Exception) -> None:
    changes: list[bool] = []

    async def broken() -> None:
        raise error

    with pytest.raises(type(error)):
        await gate(changes).retry(broken)
    assert changes == []


async def test_the_first_call_that_gets_through_ends_the_outage_for_all() -> None:
    changes: list[bool] = []
    shared = gate(changes)
    one, other = Storage(failures=8), Storage(failures=1)
    assert set(await asyncio.gather(shared.retry(one.read), shared.retry(other.read))) == {"here"}
    assert changes[0] is True
    assert changes[-1] is False
    assert not shared.away


async def test_a_job_that_is_cancelled_stops_waiting() -> None:
    changes: list[bool] = []
    storage = Storage(failures=10**9)
    waiting = asyncio.create_task(gate(changes).retry(storage.read))
    await eventually(lambda: storage.calls > 2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_call_that_never_failed_does_not_end_the_outage_of_another() -> None:
    """Storage that is full refuses writes and answers reads."""
    changes: list[bool] = []
    shared, full = gate(changes), Storage(failures=10**9)
    writing = asyncio.create_task(shared.retry(full.read))
    await eventually(lambda: shared.away)
    assert await shared.retry(Storage(failures=0).read) == "here"
    assert changes == [True]
    full.failures = 0
    await writing
    assert changes == [True, False]


async def test_the_outage_ends_when_the_only_job_that_waits_for_storage_is_cancelled() -> None:
    """Nothing would call the storage any more, so nothing would ever end it."""
    changes: list[bool] = []
    shared = gate(changes)
    waiting = asyncio.create_task(shared.retry(Storage(failures=10**9).read))
    await eventually(lambda: shared.away)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert (changes, shared.away) == ([True, False], False)


async def test_an_outage_and_its_end_are_known_without_any_job() -> None:
    changes: list[bool] = []
    shared = gate(changes)
    answers: list[Exception | None] = [None, ValueError("bug"), *[StorageUnavailable("nobody there")] * 3, None]

    async def ready() -> None:
        answer = answers.pop(0) if answers else None
        if answer is not None:
            raise answer

    watching = asyncio.create_task(watch(shared, ready, every_s=0.001))
    await eventually(lambda: changes == [True, False])
    watching.cancel()
    await asyncio.wait({watching})
    assert not shared.away


async def test_an_outage_that_nobody_waits_for_any_more_is_over_for_the_next_job_to_find() -> None:
    """A worker that has paused would not take a job otherwise, and never learn that storage is back."""
    changes: list[bool] = []
    shared, storage = gate(changes), Storage(failures=10**9)
    first, second = (asyncio.create_task(shared.retry(storage.read)) for _ in range(2))
    await eventually(lambda: storage.calls > 4)
    first.cancel()
    await asyncio.wait({first})
    assert (shared.away, changes) == (True, [True]), "one still waits"
    second.cancel()
    await asyncio.wait({second})
    assert (shared.away, changes) == (False, [True, False])


async def test_a_call_that_ends_otherwise_during_an_outage_ends_it_too() -> None:
    changes: list[bool] = []
    errors = [StorageUnavailable("nobody there"), FileNotFoundError("0.wav")]

    async def send() -> None:
        raise errors.pop(0)

    with pytest.raises(FileNotFoundError):
        await gate(changes).retry(send)
    assert changes == [True, False]
