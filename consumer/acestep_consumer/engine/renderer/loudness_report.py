# SPDX-License-Identifier: Apache-2.0
"""Warnings about songs that are not as loud as their request asked for."""

from collections.abc import Iterable, Iterator
from typing import Final

from acestep_consumer.domain.job import Track
from acestep_schemas.events import Adjustment
from acestep_schemas.request import GenerationRequest

_TOLERANCE: Final = 0.05


def loudness_adjustments(asked: GenerationRequest, tracks: Iterable[Track]) -> Iterator[Adjustment]:
    """Yield a note on each song that stayed below ``loudness_lufs``, with the loudness that it has."""
    for index, track in enumerate(tracks):
        if asked.loudness_lufs is None or track.loudness is None:
            continue
        reached = track.loudness.lufs
        if reached is None:
            why = "it is silent"
        elif reached < asked.loudness_lufs - _TOLERANCE:
            why = f"louder, its true peak would be above {asked.true_peak_db:g} dB"
        else:
            continue
        applied = None if reached is None else round(reached, 2)
        yield Adjustment(
            field="loudness_lufs", requested=asked.loudness_lufs, applied=applied, reason=f"song {index}: {why}"
        )
