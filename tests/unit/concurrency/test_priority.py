# SPDX-License-Identifier: Apache-2.0
"""Waiting queues by priority: who passes whom, and who does not wait for ever."""

from collections import deque

from acestep_consumer.concurrency.priority import HEAD_START_S, insert, rank_of


def in_order(*arrivals: tuple[str, int, float]) -> str:
    """Insert jobs of (name, priority, second of arrival) as they arrive; return their names in order."""
    queue: deque[tuple[str, float]] = deque()
    for name, priority, now_s in arrivals:
        insert(queue, (name, rank_of(priority, now_s)), lambda each: each[1])
    return "".join(name for name, _ in queue)


def test_equal_priorities_keep_the_order_of_arrival() -> None:
    assert in_order(("a", 0, 0), ("b", 0, 0), ("c", 0, 1)) == "abc"
    assert in_order(("a", 9, 0), ("b", 9, 0), ("c", 9, 0)) == "abc"


def test_a_higher_priority_passes_those_that_came_before() -> None:
    assert in_order(("a", 0, 0), ("b", 5, 1), ("c", 9, 2), ("d", 9, 3), ("e", 1, 4)) == "cdbea"


def test_whoever_has_waited_longer_than_the_head_start_is_not_passed_any_more() -> None:
    """However many of priority 9 come: a job of priority 0 is passed by those of the next four and a half minutes."""
    assert 9 * HEAD_START_S == 270
    assert in_order(("a", 0, 0), ("b", 9, 269), ("c", 9, 271)) == "bac"
