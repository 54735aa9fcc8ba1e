# SPDX-License-Identifier: Apache-2.0
"""SharedLock: many holders or one, in order. KeyedLock: one a key. A cancellation leaves nothing behind in either."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_consumer.concurrency.locks import KeyedLock, SharedLock


class LockUsers:
    """Coroutines that acquire a shared lock, and which of them hold it."""

    def __init__(self) -> None:
        self.lock = SharedLock()
        self.holding: list[str] = []
        self.acquired: list[str] = []
        self._releases: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def acquire(self, name: str) -> None:
        """Acquire the lock, or wait; names that begin with "alone" acquire it exclusively."""
        self._releases[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._hold(name))
        await self.settle()

    async def release(self, name: str) -> None:
        self._releases[name].set()
        await self.settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await self.settle()

    @staticmethod
    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _hold(self, name: str) -> None:
        alone = name.startswith("alone")
        async with self.lock.alone() if alone else self.lock.shared():
            assert not self.holding or not (alone or self.holding[0].startswith("alone")), (name, self.holding)
            self.holding.append(name)
            self.acquired.append(name)
            try:
                await self._releases[name].wait()
            finally:
                self.holding.remove(name)


@asynccontextmanager
async def lock_users() -> AsyncIterator[LockUsers]:
    users = LockUsers()
    try:
        yield users
    finally:
        await users.close()
        assert (users.lock._inside, users.lock._one_alone) == (0, False)


async def test_many_share_the_lock() -> None:
    async with lock_users() as users:
        for name in "abc":
            await users.acquire(name)
        assert users.holding == ["a", "b", "c"]


async def test_one_who_wants_to_be_alone_waits_for_all_and_then_goes_before_the_others() -> None:
    async with lock_users() as users:
        for name in ("a", "b", "alone 1", "c", "alone 2"):
            await users.acquire(name)
        assert users.holding == ["a", "b"]
        await users.release("a")
        assert users.holding == ["b"]
        for leaving, found in (("b", "alone 1"), ("alone 1", "alone 2"), ("alone 2", "c")):
            await users.release(leaving)
            assert users.holding == [found]


async def test_one_who_goes_from_sharing_to_being_alone_is_not_overtaken_by_newcomers() -> None:
    lock, order = SharedLock(), []

    async def suspect(name: str) -> None:
        async with lock.shared():
            await asyncio.sleep(0)
        async with lock.alone():
            order.append(name)
            await asyncio.sleep(0)

    async def newcomer() -> None:
        await asyncio.sleep(0)
        async with lock.shared():
            order.append("newcomer")

    await asyncio.gather(suspect("first"), suspect("second"), newcomer())
    assert order == ["first", "second", "newcomer"]


async def test_who_gives_up_waiting_to_be_alone_no_longer_holds_the_others_up() -> None:
    async with lock_users() as users:
        for name in ("a", "alone", "b"):
            await users.acquire(name)
        await users.cancel("alone")
        assert users.holding == ["a", "b"]


async def test_who_is_cancelled_just_when_its_turn_came_gives_the_place_back() -> None:
    lock = SharedLock()
    async with lock.alone():
        waiting = asyncio.create_task(lock.alone().__aenter__())
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(1), lock.alone():
        pass


async def test_a_visit_that_ends_badly_frees_the_room() -> None:
    lock = SharedLock()
    for visit in (lock.shared, lock.alone):
        with pytest.raises(RuntimeError):
            async with visit():
                raise RuntimeError
    async with asyncio.timeout(1), lock.alone():
        pass


STEP = st.tuples(st.sampled_from(("share", "alone", "leave", "cancel")), st.integers(0, 6))


@given(st.lists(STEP, max_size=40))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_nobody_meets_one_who_is_alone_and_nobody_waits_for_nothing(
    steps: list[tuple[str, int]],
) -> None:
    asyncio.run(play(steps))


async def play(steps: list[tuple[str, int]]) -> None:
    async with lock_users() as users:
        present: list[str] = []
        for number, (step, which) in enumerate(steps):
            if step in {"share", "alone"}:
                present.append(f"{step} {number}")
                await users.acquire(present[-1])
            elif step == "cancel" and present:
                await users.cancel(present.pop(which % len(present)))
            elif step == "leave" and users.holding:
                present.remove(name := users.holding[which % len(users.holding)])
                await users.release(name)
            assert_fair(users, present)
        while present:
            assert users.holding, f"all wait for nothing: {present}"
            present.remove(name := users.holding[0])
            await users.release(name)
            assert_fair(users, present)


def assert_fair(users: LockUsers, present: list[str]) -> None:
    """Inside is one alone, or some in company; who waits waits for a reason; each line is served in its order."""
    waiting = [name for name in present if name not in users.holding]
    alone = [name for name in users.holding if name.startswith("alone")]
    assert len(alone) <= 1
    assert not alone or len(users.holding) == 1
    if waiting:
        assert users.holding
    if any(name.startswith("share") for name in waiting):
        assert alone or any(name.startswith("alone") for name in waiting)
    for kind in ("alone", "share"):
        came = [int(name.split()[1]) for name in users.acquired if name.startswith(kind)]
        assert came == sorted(came)


async def test_the_same_key_waits_and_another_key_does_not() -> None:
    turns, order = KeyedLock(), []

    async def take(key: str, name: str, gate: asyncio.Event) -> None:
        async with turns.of(key):
            order.append(f"{name} in")
            await gate.wait()
            order.append(f"{name} out")

    gate, open_gate = asyncio.Event(), asyncio.Event()
    open_gate.set()
    first = asyncio.create_task(take("a", "first", gate))
    second = asyncio.create_task(take("a", "second", open_gate))
    await asyncio.sleep(0)
    await take("b", "other", open_gate)
    assert order == ["first in", "other in", "other out"]
    gate.set()
    await asyncio.gather(first, second)
    assert order[-3:] == ["first out", "second in", "second out"]


async def test_a_turn_that_ends_badly_or_is_cancelled_frees_the_key() -> None:
    turns = KeyedLock()
    with pytest.raises(RuntimeError):
        async with turns.of("a"):
            raise RuntimeError
    async with turns.of("a"):
        waiting = asyncio.create_task(turns.of("a").__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait((waiting,))
    assert turns._locks == {}
