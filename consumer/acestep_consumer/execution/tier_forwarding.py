# SPDX-License-Identifier: Apache-2.0
"""Requests that another card is better for: handed on before anything is begun (``ACESTEP_ROUTE_BY_TIER``)."""

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
    """Every request is done by the worker that took it."""

    async def send_on(self, request: Request, delivery: Delivery) -> None:
        """Do nothing."""


class TierForwarding:
    """What exceeds this card's limits goes to a larger one, as long as a worker has one."""

    def __init__(self, limits: Callable[[], Limits], table: TierTable) -> None:
        """Raise ``TierTableError`` when a tier's name cannot be that of a queue."""
        queue_names(table)
        self._limits = limits
        self._table = table
        self.sent: Counter[str] = Counter()
        """Requests sent on so far, by the name of the tier."""

    async def send_on(self, request: Request, delivery: Delivery) -> None:
        """Hand the request to the queue of a larger tier that grants more of it and has a worker, the best first.

        Raises:
            SentOn: a copy is safe there. The delivery may be acked.
            Interrupted: nobody knows whether it is. The delivery goes back; the same end answers both.
        """
        for tier in better_tiers(request, self._limits(), self._table, delivery.tier):
            if await self._taken_by(tier, delivery):
                self.sent[tier] += 1
                log.info("sent on to a larger card", tier=tier)
                raise ForwardedToTier(tier)

    async def _taken_by(self, tier: str, delivery: Delivery) -> bool:
        try:
            return await delivery.forward(tier)
        except Unpublished as error:
            raise Interrupted(f"not sent on to {tier}: {error}") from error
