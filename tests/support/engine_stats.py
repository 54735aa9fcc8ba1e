# SPDX-License-Identifier: Apache-2.0
"""Plausible engine stats for tests."""

from dataclasses import replace
from typing import Any

from acestep_consumer.engine.messages import EngineStats

_PLAUSIBLE = EngineStats(
    busy_s=5,
    songs_done=4,
    audio_s=120,
    pending=3,
    songs_in_pack=2,
    tokens_in_pack=750,
    memory_gb=12.5,
    memory_limit_gb=40,
    reductions=1,
)


def engine_stats(**fields: Any) -> EngineStats:
    """Return stats with these fields."""
    return replace(_PLAUSIBLE, **fields)
