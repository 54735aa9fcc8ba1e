# SPDX-License-Identifier: Apache-2.0
"""Divides a worker's prefetch among queues and consumers. Pure.

RabbitMQ fixes a consumer's prefetch when the consumer starts, and deliveries of a cancelled consumer stay with the
worker until they are settled. So a larger prefetch starts one more consumer, for the difference; a smaller one cancels
as many as hold too much together, and starts small ones in their place as deliveries are settled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class PrefetchShare:
    """The prefetch of one consumer: up to ``count`` unsettled deliveries of ``queue``."""

    queue: str
    count: int


def next_start(
    shares: Mapping[str, PrefetchShare], left_over: Mapping[str, int], targets: Mapping[str, int], limit: int
) -> PrefetchShare | None:
    """Return the consumer to start next; None: none.

    Args:
        shares: the shares of the present consumers, by tag, the oldest first.
        left_over: unsettled deliveries whose consumer was cancelled, by queue.
        targets: deliveries that each queue may have unsettled; earlier queues get room first.
        limit: deliveries that may be unsettled in all.
    """
    room = limit - _total(shares.values(), left_over)
    for queue, target in targets.items():
        missing = min(room, target - _count_of(queue, shares.values(), left_over))
        if missing > 0:
            return PrefetchShare(queue, missing)
    return None


def next_stop(
    shares: Mapping[str, PrefetchShare], left_over: Mapping[str, int], targets: Mapping[str, int], limit: int
) -> str | None:
    """Return the tag of the consumer to cancel next, the newest of those with too large a share; None: none."""
    too_many = _total(shares.values(), left_over) > limit
    for tag, share in reversed(list(shares.items())):
        if too_many or _count_of(share.queue, shares.values(), left_over) > targets.get(share.queue, 0):
            return tag
    return None


def _total(shares: Iterable[PrefetchShare], left_over: Mapping[str, int]) -> int:
    return sum(share.count for share in shares) + sum(left_over.values())


def _count_of(queue: str, shares: Iterable[PrefetchShare], left_over: Mapping[str, int]) -> int:
    return sum(share.count for share in shares if share.queue == queue) + left_over.get(queue, 0)
