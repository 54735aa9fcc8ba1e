# SPDX-License-Identifier: Apache-2.0
"""How the deliveries that a worker may have in hand are shared out among queues and consumers. Pure.

RabbitMQ fixes a consumer's prefetch when the consumer starts, and what a cancelled consumer holds stays in hand until
it is settled. So more room starts one more consumer, for the difference; less room cancels as many as hold too much
together, and starts small ones in their place as deliveries are settled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class PrefetchShare:
    """What one consumer may hold: up to ``count`` deliveries of ``queue``."""

    queue: str
    count: int


def next_start(
    shares: Mapping[str, PrefetchShare], left_over: Mapping[str, int], targets: Mapping[str, int], most: int
) -> PrefetchShare | None:
    """Return the consumer to start next; None: none.

    Args:
        shares: of the consumers that there are, by tag, the oldest first.
        left_over: deliveries in hand whose consumer is gone, by queue.
        targets: deliveries that may be in hand, by queue; what comes first gets room first.
        most: deliveries that may be in hand in all.
    """
    room = most - _held_in_all(shares.values(), left_over)
    for queue, target in targets.items():
        lack = min(room, target - _held(queue, shares.values(), left_over))
        if lack > 0:
            return PrefetchShare(queue, lack)
    return None


def next_stop(
    shares: Mapping[str, PrefetchShare], left_over: Mapping[str, int], targets: Mapping[str, int], most: int
) -> str | None:
    """Return the tag of the consumer to cancel next, the youngest of those that may hold too much; None: none."""
    too_many = _held_in_all(shares.values(), left_over) > most
    for tag, share in reversed(list(shares.items())):
        if too_many or _held(share.queue, shares.values(), left_over) > targets.get(share.queue, 0):
            return tag
    return None


def _held_in_all(shares: Iterable[PrefetchShare], left_over: Mapping[str, int]) -> int:
    return sum(share.count for share in shares) + sum(left_over.values())


def _held(queue: str, shares: Iterable[PrefetchShare], left_over: Mapping[str, int]) -> int:
    return sum(share.count for share in shares if share.queue == queue) + left_over.get(queue, 0)
