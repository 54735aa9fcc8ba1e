# SPDX-License-Identifier: Apache-2.0
"""The tiers that have a queue of their own, by the settings."""

from acestep_consumer.config.settings import Settings
from acestep_consumer.policy.tier_choice import queue_names
from acestep_consumer.policy.tiers import load_table


def tier_names(settings: Settings) -> tuple[str, ...] | None:
    """Return the names of all tiers, the smallest first; None: nothing is sent on, without ``ACESTEP_ROUTE_BY_TIER``.

    Raises:
        TierTableError: the file of ``ACESTEP_TIER_TABLE`` is none, or a name in it cannot be that of a queue.
    """
    if not settings.broker.route_by_tier:
        return None
    return queue_names(load_table(settings.worker.tier_table))
