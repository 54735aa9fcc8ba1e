# SPDX-License-Identifier: Apache-2.0
"""Turns: same key one after the other, different keys side by side, nothing left behind."""

import asyncio

import pytest

from acestep_consumer.concurrency.locks import KeyedLock


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
