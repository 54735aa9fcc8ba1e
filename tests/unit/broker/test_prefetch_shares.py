# SPDX-License-Identifier: Apache-2.0
"""The prefetch shared out among queues and consumers, move by move."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.broker.prefetch_shares import PrefetchShare, next_start, next_stop

MAIN, SIDE = "main", "side"


@dataclass
class Consumers:
    """Consumers and what they hold, without a broker."""

    most: int
    shares: dict[str, PrefetchShare] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    gone: Counter[str] = field(default_factory=Counter)
    tags: int = 0

    @property
    def in_hand(self) -> int:
        return sum(self.held.values()) + self.gone.total()

    def arrange(self, targets: dict[str, int]) -> None:
        """Make moves until there is none, never letting more come than may be unacknowledged."""
        for _ in range(1_000):
            tag = next_stop(self.shares, self.gone, targets, self.most)
            if tag is None:
                break
            self.gone[self.shares.pop(tag).queue] += self.held.pop(tag)
        for _ in range(1_000):
            share = next_start(self.shares, self.gone, targets, self.most)
            if share is None:
                break
            assert share.count > 0
            self.tags += 1
            self.shares[f"tag{self.tags}"], self.held[f"tag{self.tags}"] = share, 0
        assert sum(share.count for share in self.shares.values()) + self.gone.total() <= max(self.most, self.in_hand)

    def may_hold(self, queue: str) -> int:
        return sum(share.count for share in self.shares.values() if share.queue == queue) + self.gone[queue]

    def deliver(self, chance: random.Random) -> None:
        for tag, share in self.shares.items():
            self.held[tag] = min(share.count, self.held[tag] + chance.randint(0, share.count))

    def settle(self, chance: random.Random) -> None:
        for tag, count in self.held.items():
            self.held[tag] = count - chance.randint(0, count)
        for queue, count in list(self.gone.items()):
            self.gone[queue] = count - chance.randint(0, count)

    def settle_all(self) -> None:
        self.held = dict.fromkeys(self.held, 0)
        self.gone.clear()


def test_a_queue_alone_has_all_of_it() -> None:
    assert next_start({}, {}, {MAIN: 4}, 4) == PrefetchShare(MAIN, 4)
    assert next_start({"a": PrefetchShare(MAIN, 4)}, {}, {MAIN: 4}, 4) is None


def test_more_room_is_one_more_consumer_for_the_difference() -> None:
    assert next_start({"a": PrefetchShare(MAIN, 2)}, {}, {MAIN: 5}, 5) == PrefetchShare(MAIN, 3)


def test_what_a_cancelled_consumer_left_unacknowledged_takes_its_place_until_it_is_settled() -> None:
    assert next_start({}, {MAIN: 4}, {SIDE: 2, MAIN: 2}, 4) is None
    assert next_start({}, {MAIN: 3}, {SIDE: 2, MAIN: 2}, 4) == PrefetchShare(SIDE, 1)
    assert next_start({"a": PrefetchShare(SIDE, 1)}, {MAIN: 2}, {SIDE: 2, MAIN: 2}, 4) == PrefetchShare(SIDE, 1)


def test_the_youngest_consumer_of_a_queue_that_may_hold_too_much_goes_first() -> None:
    shares = {"a": PrefetchShare(MAIN, 1), "b": PrefetchShare(SIDE, 1), "c": PrefetchShare(MAIN, 2)}
    assert next_stop(shares, {}, {SIDE: 2, MAIN: 2}, 4) == "c"
    assert next_stop(shares, {}, {SIDE: 0, MAIN: 3}, 4) == "b"
    assert next_stop(shares, {}, {SIDE: 1, MAIN: 3}, 4) is None


def test_what_another_queue_left_unacknowledged_counts_too() -> None:
    assert next_stop({"a": PrefetchShare(MAIN, 1)}, {SIDE: 1}, {SIDE: 0, MAIN: 1}, 1) == "a"


def test_without_targets_every_consumer_goes() -> None:
    assert next_stop({"a": PrefetchShare(MAIN, 1)}, {}, {}, 4) == "a"
    assert next_start({}, {}, {}, 4) is None


@given(
    most=st.integers(1, 8),
    wishes=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 10)), min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
)
def test_never_more_than_the_count_may_come_and_every_wish_comes_true_in_the_end(
    most: int, wishes: list[tuple[int, int]], seed: int
) -> None:
    chance, consumers = random.Random(seed), Consumers(most)  # noqa: S311 - a repeatable run
    for count, side in wishes:
        consumers.most = count
        targets = {SIDE: min(side, count), MAIN: count - min(side, count)}
        consumers.arrange(targets)
        consumers.deliver(chance)
        consumers.settle(chance)
        consumers.arrange(targets)
    consumers.settle_all()
    consumers.arrange(targets)
    assert {queue: consumers.may_hold(queue) for queue in targets} == targets
