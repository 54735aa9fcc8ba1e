# SPDX-License-Identifier: Apache-2.0
"""Which larger cards would give a request more than this one can. Pure."""

import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod

from acestep_consumer.domain.errors import ConsumerError, LimitExceeded, LmUnavailable
from acestep_consumer.domain.job import Request
from acestep_consumer.policy.admit import Limits, admit
from acestep_consumer.policy.tiers import Tier, TierTable, TierTableError
from acestep_schemas.events import Adjustment, LmChoice

_BY_TIER = ("audio_duration", "batch_size")
"""What a larger card allows more of; all else is bounded alike everywhere."""

# A tier's name becomes part of a queue's name and of a binding, where * and # stand for others; the queues on which
# the broker's limit is measured have the other name.
_NAME = re.compile(r"(?!probe-)[A-Za-z0-9_.-]+")


def queue_names(table: TierTable) -> tuple[str, ...]:
    """Return the tiers' names, the smallest first. Raises ``TierTableError`` unless each can be that of a queue."""
    names = tuple(tier.name for tier in table.tiers)
    for name in names:
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise TierTableError(
                f"ACESTEP_TIER_TABLE: with ACESTEP_ROUTE_BY_TIER each tier has a queue of its name, so {name!r} must "
                "occur once, have letters, digits, '.', '_' and '-' alone, and not begin with 'probe-'"
            )
    return names


def better_tiers(request: Request, limits: Limits, table: TierTable, came_by: str | None = None) -> Iterator[str]:
    """Yield the names of larger tiers that grant more of the request than this worker does, the best first.

    Of those that grant as much as each other the smallest comes first: the largest cards are for what nobody else can.
    What asks for rejection is granted whole or not at all.

    Args:
        request: what is asked.
        limits: what this worker has; a larger card is taken to have the same models, and the LM that its tier has.
        table: the tiers, the smallest first.
        came_by: the tier whose queue the request came from. Only tiers larger than that one are yielded, so that no
            request goes in circles; none, if the table does not know it.
    """
    try:
        here = _granted(request, limits)
    except ConsumerError:
        return  # it would fail anywhere, and the story says how
    if here < 1:
        offers = [(_granted(request, _on(tier, limits)), tier.name) for tier in _larger(limits, table, came_by)]
        yield from (name for granted, name in sorted(offers, key=lambda offer: -offer[0]) if granted > here)


def _granted(request: Request, limits: Limits) -> float:
    """Return how much of what a tier bounds would be done: 1 all of it, 0 nothing."""
    try:
        return prod(map(_share, admit(request, limits).policy.adjustments))
    except (LimitExceeded, LmUnavailable):
        return 0


def _share(change: Adjustment) -> float:
    if change.field not in _BY_TIER:
        return 1
    return min(1, float(str(change.applied)) / float(str(change.requested)))


def _on(tier: Tier, limits: Limits) -> Limits:
    """What a worker of that tier probably has."""
    lm = limits.lm
    if lm is None and tier.lm_by_default:
        lm = LmChoice(model=tier.lms[-1], backend="vllm")
    return replace(limits, tier=tier, lm=lm)


def _larger(limits: Limits, table: TierTable, came_by: str | None) -> tuple[Tier, ...]:
    ranks = {tier.name: rank for rank, tier in enumerate(table.tiers, 1)}
    here, behind = ranks.get(limits.tier.name), ranks.get(came_by) if came_by else 0
    return () if here is None or behind is None else table.tiers[max(here, behind) :]
