# SPDX-License-Identifier: Apache-2.0
"""SharedLock: many holders or one, in order. KeyedLock: one a key. A cancellation leaves nothing behind in either."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_consumer.concurrency.locks import KeyedLock, SharedLock


class Guests:
    """Send coroutines into a room, and see who is inside."""

    def __init__(self) -> None:
        self.room = SharedLock()
        self.inside: list[str] = []
        self.came: list[str] = []
        self._doors: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def send(self, name: str) -> None:
        """Let one in, or wait; names that begin with "alone" want to be."""
        self._doors[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._visit(name))
        await self.settle()

    async def call_out(self, name: str) -> None:
        self._doors[name].set()
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

    async def _visit(self, name: str) -> None:
        alone = name.startswith("alone")
        async with self.room.alone() if alone else self.room.shared():
            assert not self.inside or not (alone or self.inside[0].startswith("alone")), (name, self.inside)
            self.inside.append(name)
            self.came.append(name)
            try:
                await self._doors[name].wait()
            finally:
                self.inside.remove(name)


@asynccontextmanager
async def guests() -> AsyncIterator[Guests]:
    visitors = Guests()
    try:
        yield visitors
    finally:
        await visitors.close()
        assert (visitors.room._inside, visitors.room._one_alone) == (0, False)


async def test_many_share_the_room() -> None:
    async with guests() as visitors:
        for name in "abc":
            await visitors.send(name)
        assert visitors.inside == ["a", "b", "c"]


async def test_one_who_wants_to_be_alone_waits_for_all_and_then_goes_before_the_others() -> None:
    async with guests() as visitors:
        for name in ("a", "b", "alone 1", "c", "alone 2"):
            await visitors.send(name)
        assert visitors.inside == ["a", "b"]
        await visitors.call_out("a")
        assert visitors.inside == ["b"]
        for leaving, found in (("b", "alone 1"), ("alone 1", "alone 2"), ("alone 2", "c")):
            await visitors.call_out(leaving)
            assert visitors.inside == [found]


async def test_one_who_goes_from_company_to_being_alone_is_not_overtaken_by_newcomers() -> None:
    room, order = SharedLock(), []

    async def suspect(name: str) -> None:
        async with room.shared():
            await asyncio.sleep(0)
        async with room.alone():
            order.append(name)
            await asyncio.sleep(0)

    async def newcomer() -> None:
        await asyncio.sleep(0)
        async with room.shared():
            order.append("newcomer")

    await asyncio.gather(suspect("first"), suspect("second"), newcomer())
    assert order == ["first", "second", "newcomer"]


async def test_who_gives_up_waiting_to_be_alone_no_longer_holds_the_others_up() -> None:
    async with guests() as visitors:
        for name in ("a", "alone", "b"):
            await visitors.send(name)
        await visitors.cancel("alone")
        assert visitors.inside == ["a", "b"]


async def test_who_is_cancelled_just_when_its_turn_came_gives_the_place_back() -> None:
    room = SharedLock()
    async with room.alone():
        waiting = asyncio.create_task(room.alone().__aenter__())
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(1), room.alone():
        pass


async def test_a_visit_that_ends_badly_frees_the_room() -> None:
    room = SharedLock()
    for visit in (room.shared, room.alone):
        with pytest.raises(RuntimeError):
            async with visit():
                raise RuntimeError
    async with asyncio.timeout(1), room.alone():
        pass


STEP = st.tuples(st.sampled_from(("share", "alone", "leave", "cancel")), st.integers(0, 6))


@given(st.lists(STEP, max_size=40))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_nobody_meets_one_who_is_alone_and_nobody_waits_for_nothing(
    steps: list[tuple[str, int]],
) -> None:
    asyncio.run(play(steps))


async def play(steps: list[tuple[str, int]]) -> None:
    async with guests() as visitors:
        present: list[str] = []
        for number, (step, which) in enumerate(steps):
            if step in {"share", "alone"}:
                present.append(f"{step} {number}")
                await visitors.send(present[-1])
            elif step == "cancel" and present:
                await visitors.cancel(present.pop(which % len(present)))
            elif step == "leave" and visitors.inside:
                present.remove(name := visitors.inside[which % len(visitors.inside)])
                await visitors.call_out(name)
            assert_fair(visitors, present)
        while present:
            assert visitors.inside, f"all wait for nothing: {present}"
            present.remove(name := visitors.inside[0])
            await visitors.call_out(name)
            assert_fair(visitors, present)


def assert_fair(visitors: Guests, present: list[str]) -> None:
    """Inside is one alone, or some in company; who waits waits for a reason; each line is served in its order."""
    waiting = [name for name in present if name not in visitors.inside]
    alone = [name for name in visitors.inside if name.startswith("alone")]
    assert len(alone) <= 1
    assert not alone or len(visitors.inside) == 1
    if waiting:
        assert visitors.inside
    if any(name.startswith("share") for name in waiting):
        assert alone or any(name.startswith("alone") for name in waiting)
    for kind in ("alone", "share"):
        came = [int(name.split()[1]) for name in visitors.came if name.startswith(kind)]
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
