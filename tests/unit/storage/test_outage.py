# SPDX-License-Identifier: Apache-2.0
"""Storage that is away: who waits, who does not, and who is told."""

import asyncio

import pytest

from acestep_consumer.domain.errors import InputUnreadable, ManifestUnreadable, StorageUnavailable
from acestep_consumer.storage.outage import OutageGate
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


def patience(told: list[bool]) -> OutageGate:
    async def tell(away: bool) -> None:  # noqa: FBT001 - a callback's one argument
        told.append(away)

    return OutageGate(tell, first_s=0.001, last_s=0.002)


async def test_a_call_is_made_again_until_storage_is_back_and_both_are_told_once() -> None:
    told: list[bool] = []
    storage = Storage(failures=5)
    assert await patience(told).outlast(lambda: storage.read()) == "here"  # noqa: PLW0108 - as its callers write it
    assert (storage.calls, told) == (6, [True, False])


async def test_nobody_is_told_of_storage_that_answers() -> None:
    told: list[bool] = []
    assert await patience(told).outlast(Storage(failures=0).read) == "here"
    assert told == []


@pytest.mark.parametrize(
    "error", [ManifestUnreadable("not a manifest"), InputUnreadable("no audio"), ValueError("bug")]
)
async def test_what_waiting_cannot_change_is_raised_at_once(error: Exception) -> None:
    told: list[bool] = []

    async def broken() -> None:
        raise error

    with pytest.raises(type(error)):
        await patience(told).outlast(broken)
    assert told == []


async def test_the_first_call_that_gets_through_ends_the_outage_for_all() -> None:
    told: list[bool] = []
    shared = patience(told)
    one, other = Storage(failures=8), Storage(failures=1)
    assert set(await asyncio.gather(shared.outlast(one.read), shared.outlast(other.read))) == {"here"}
    assert told[0] is True
    assert told[-1] is False
    assert not shared.away


async def test_a_job_that_is_cancelled_stops_waiting() -> None:
    told: list[bool] = []
    storage = Storage(failures=10**9)
    waiting = asyncio.create_task(patience(told).outlast(storage.read))
    await eventually(lambda: storage.calls > 2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
