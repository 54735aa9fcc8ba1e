# SPDX-License-Identifier: Apache-2.0
"""Chooses the larger tiers that grant a request more than this worker can. Pure."""

import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod

from acestep_consumer.domain.errors import ConsumerError, LimitExceeded, LmUnavailable
from acestep_consumer.domain.job import Request
from acestep_consumer.policy.admit import Limits, admit
from acestep_consumer.policy.tiers import SHIPPED, Tier, TierTable, TierTableError, others
from acestep_schemas.events import Adjustment, LmChoice

_BY_TIER = ("audio_duration", "batch_size", "candidates")
"""The fields that tiers limit; all others have the same bounds everywhere."""

# A tier's name becomes part of a queue name and of a binding key, where * and # are wildcards. Queues that begin with
# "probe-" are those on which the queue limit is measured.
_NAME = re.compile(r"(?!probe-)[A-Za-z0-9_.-]+")


def queue_names(table: TierTable) -> tuple[str, ...]:
    """Return the tiers' names, smallest first.

    Raises:
        TierTableError: one cannot be part of a queue name, or is that of a shipped tier with other limits. Workers with
            a shipped table would forward requests to it, and get less than they count on.
    """
    names = tuple(tier.name for tier in table.tiers)
    for name in names:
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise TierTableError(
                f"ACESTEP_TIER_TABLE: with ACESTEP_ROUTE_BY_TIER each tier has a queue of its name, so {name!r} must "
                "be unique, consist of letters, digits, '.', '_' and '-', and not begin with 'probe-'"
            )
    if table not in SHIPPED.values():
        _check_own_names(table)
    return names


def _check_own_names(table: TierTable) -> None:
    shipped = [tier for other in SHIPPED.values() for tier in other.tiers]
    taken = [tier.name for tier in table.tiers if tier not in shipped and tier.name in {each.name for each in shipped}]
    if taken:
        raise TierTableError(
            f"ACESTEP_TIER_TABLE: with ACESTEP_ROUTE_BY_TIER, {', '.join(taken)} must have names of their own, such as "
            f"our-{taken[0]}: workers with a table that is shipped count on its limits there"
        )


def served_names(table: TierTable) -> tuple[str, ...]:
    """Return the tiers whose queues a worker looks after: its own table's, then those of the other shipped tables.

    Workers with another table may have forwarded requests to these, and have left. Raises ``TierTableError`` likewise.
    """
    foreign = (tier.name for other in others(table) for tier in other.tiers)
    return tuple(dict.fromkeys((*queue_names(table), *foreign)))


def better_tiers(request: Request, limits: Limits, table: TierTable, came_by: str | None = None) -> Iterator[str]:
    """Yield the names of larger tiers that grant more of the request than this worker does, best first.

    Among equals the smallest tier comes first, to keep the largest GPUs for requests that need them. A request with
    ``on_limit: reject`` is granted completely or not at all.

    Args:
        request: the request.
        limits: this worker's; a larger GPU is assumed to have the same models, and its tier's default LM.
        table: the tiers, smallest first.
        came_by: the tier whose queue the request came from. Only larger tiers are yielded, so that no request is
            forwarded in circles; none if the table does not contain it.
    """
    try:
        here = _granted(request, limits)
    except ConsumerError:
        return  # it would fail anywhere
    if here < 1:
        offers = [(_granted(request, _on(tier, limits)), tier.name) for tier in _larger(limits, table, came_by)]
        yield from (name for granted, name in sorted(offers, key=lambda offer: -offer[0]) if granted > here)


def _granted(request: Request, limits: Limits) -> float:
    """Return the share of the request that would be granted: 1 all of it, 0 nothing."""
    try:
        return prod(map(_share, admit(request, limits).policy.adjustments))
    except (LimitExceeded, LmUnavailable):
        return 0


def _share(change: Adjustment) -> float:
    if change.field not in _BY_TIER:
        return 1
    return min(1, float(str(change.applied)) / float(str(change.requested)))


def _on(tier: Tier, limits: Limits) -> Limits:
    """Return the presumable limits of a worker of that tier."""
    lm = limits.lm
    if lm is None and tier.lm_by_default:
        lm = LmChoice(model=tier.lms[-1], backend="vllm")
    return replace(limits, tier=tier, lm=lm)


def _larger(limits: Limits, table: TierTable, came_by: str | None) -> tuple[Tier, ...]:
    ranks = {tier.name: rank for rank, tier in enumerate(table.tiers, 1)}
    here, behind = ranks.get(limits.tier.name), ranks.get(came_by) if came_by else 0
    return () if here is None or behind is None else table.tiers[max(here, behind) :]
