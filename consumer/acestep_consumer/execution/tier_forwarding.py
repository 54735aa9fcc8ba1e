# SPDX-License-Identifier: Apache-2.0
"""Forwards requests that exceed this worker's tier to the queue of a larger one (``ACESTEP_ROUTE_BY_TIER``)."""

from collections import Counter
from collections.abc import Callable

import structlog

from acestep_consumer.domain.errors import ForwardedToTier, Interrupted, Unpublished
from acestep_consumer.domain.job import Request
from acestep_consumer.domain.ports import Delivery
from acestep_consumer.policy.admit import Limits
from acestep_consumer.policy.tier_choice import better_tiers, queue_names
from acestep_consumer.policy.tiers import TierTable

log = structlog.get_logger()


class NoForwarding:
    """Routes without tier routing: every request stays with the worker that consumed it."""

    async def forward(self, request: Request, delivery: Delivery) -> None:
        """Do nothing."""


class TierForwarding:
    """Routes with tier routing: a request over this tier's limits goes to a larger tier that has a worker."""

    def __init__(self, limits: Callable[[], Limits], table: TierTable) -> None:
        """Raise ``TierTableError`` when a tier's name cannot be that of a queue."""
        queue_names(table)
        self._limits = limits
        self._table = table
        self.forwarded: Counter[str] = Counter()
        """Requests forwarded so far, by tier."""

    async def forward(self, request: Request, delivery: Delivery) -> None:
        """Forward the request to the larger tier that grants most of it and has a worker, if there is one.

        Raises:
            ForwardedToTier: the broker confirmed a copy on that tier's queue; the delivery may be acked.
            Interrupted: the confirm is missing. The delivery is requeued; one terminal record answers both copies.
        """
        for tier in better_tiers(request, self._limits(), self._table, delivery.tier):
            # Workers with other tables may rank the tiers in another order; nothing goes around in a circle.
            if tier not in delivery.visited_tiers and await self._forwarded_to(tier, delivery):
                self.forwarded[tier] += 1
                log.info("forwarded to a larger tier", tier=tier)
                raise ForwardedToTier(tier)

    async def _forwarded_to(self, tier: str, delivery: Delivery) -> bool:
        try:
            return await delivery.forward(tier)
        except Unpublished as error:
            raise Interrupted(f"not forwarded to {tier}: {error}") from error
