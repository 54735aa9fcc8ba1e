# SPDX-License-Identifier: Apache-2.0
"""Requests that another card is better for: handed on before anything is begun (``ACESTEP_ROUTE_BY_TIER``)."""

import re
from collections import Counter
from collections.abc import Callable

import structlog

from consumer.errors import Interrupted, SentOn, Unpublished
from consumer.job import Request
from consumer.policy.admit import Limits
from consumer.policy.routing import better_tiers
from consumer.policy.tiers import TierTable, TierTableError
from consumer.ports import Delivery

# A tier's name becomes part of a queue's name and of a binding, where * and # stand for others; the queues on which
# the broker's limit is measured have the other name.
_NAME = re.compile(r"(?!probe-)[A-Za-z0-9_.-]+")

log = structlog.get_logger()


class StayHere:
    """Every request is done by the worker that took it."""

    async def send_on(self, request: Request, delivery: Delivery) -> None:
        """Do nothing."""


class ByTier:
    """What exceeds this card's limits goes to a larger one, as long as a worker has one."""

    def __init__(self, limits: Callable[[], Limits], table: TierTable) -> None:
        """Raise ``TierTableError`` when a tier's name cannot be that of a queue."""
        _check_names(table)
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
                raise SentOn(tier)

    async def _taken_by(self, tier: str, delivery: Delivery) -> bool:
        try:
            return await delivery.forward(tier)
        except Unpublished as error:
            raise Interrupted(f"not sent on to {tier}: {error}") from error


def _check_names(table: TierTable) -> None:
    names = [tier.name for tier in table.tiers]
    for name in names:
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise TierTableError(
                f"ACESTEP_TIER_TABLE: with ACESTEP_ROUTE_BY_TIER each tier has a queue of its name, so {name!r} must "
                "occur once, have letters, digits, '.', '_' and '-' alone, and not begin with 'probe-'"
            )
