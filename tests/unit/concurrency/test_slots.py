# SPDX-License-Identifier: Apache-2.0
"""Slots for threads: who gets them, and that none is lost."""

import random
import threading

from acestep_consumer.concurrency.slots import RankedSlots
from tests.support.waiting import WITHIN_S


def test_a_slot_that_becomes_free_goes_to_the_lowest_rank_and_among_equals_to_the_first() -> None:
    slots = RankedSlots(2)
    inside = [slots.enter(5), slots.enter(5)]
    ranks = {"late": 5, "equal": 3, "equal too": 3, "early": 1}
    waiting = {name: slots.enter(rank) for name, rank in ranks.items()}
    assert all(each.granted.is_set() for each in inside)
    order: list[str] = []
    while inside:
        slots.leave(inside.pop(0))
        for name in [name for name, request in waiting.items() if request.granted.is_set()]:
            order.append(name)
            inside.append(waiting.pop(name))
    assert order == ["early", "equal", "equal too", "late"]


def test_nobody_takes_a_slot_now_that_another_one_waits_for() -> None:
    slots = RankedSlots(1)
    first = slots.enter_now()
    assert first is not None
    second = slots.enter(0)
    slots.leave(first)
    assert second.granted.is_set()
    assert slots.enter_now() is None
    slots.leave(second)
    assert slots.enter_now() is not None


def test_a_place_that_is_given_up_leaves_its_slot_to_the_next() -> None:
    slots = RankedSlots(1)
    holder, impatient, next_one = slots.enter(0), slots.enter(1), slots.enter(2)
    slots.leave(impatient)
    slots.leave(holder)
    assert (impatient.granted.is_set(), next_one.granted.is_set()) == (False, True)


def test_many_threads_never_hold_more_slots_than_there_are_and_lose_none() -> None:
    slots, lock = RankedSlots(3), threading.Lock()
    inside, most = 0, 0

    def work(seed: int) -> None:
        nonlocal inside, most
        draw = random.Random(seed)  # noqa: S311 - not for secrets
        for _ in range(100):
            request = slots.enter(draw.random())
            if draw.random() < 0.7 and request.granted.wait(WITHIN_S):
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1
            slots.leave(request)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    assert most <= 3
    assert [slots.enter_now() is not None for _ in range(4)] == [True, True, True, False]
