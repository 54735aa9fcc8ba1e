# SPDX-License-Identifier: Apache-2.0
"""Reductions after running out of memory. They are kept: a size that failed once is not tried again."""

from dataclasses import dataclass
from enum import StrEnum

from acestep_consumer.policy.memory_budget import TILE_RUNGS, MemoryBudget


class DeviceStage(StrEnum):
    """The device's current work, for the log and for the choice of a reduction."""

    PREPARE = "prepare"
    STEP = "step"
    DECODE = "decode"


@dataclass(slots=True)
class Degradation:
    """Limits of one call: ``tokens`` of a batch, ``tiles`` of a decode, ``jobs`` prepared together.

    ``reductions`` counts how often one of them was lowered.
    """

    tokens: int
    tiles: int
    jobs: int = 16
    reductions: int = 0

    @classmethod
    def of(cls, budget: MemoryBudget) -> "Degradation":
        """Return the limits that the budget allows."""
        return cls(tokens=budget.tokens, tiles=budget.tiles)

    def step_down(self, stage: DeviceStage, size: int, tokens: int) -> str | None:
        """Lower the limit of ``stage``, which ran out of memory with ``size`` jobs or songs and so many tokens.

        Returns the reduction as text for the job's event, or None when there is nothing left to lower here.
        """
        match stage:
            case DeviceStage.PREPARE:
                reduction = self._fewer_jobs(size)
            case DeviceStage.STEP:
                reduction = self._fewer_tokens(size, tokens)
            case DeviceStage.DECODE:
                reduction = self._fewer_tiles()
        self.reductions += reduction is not None
        return reduction

    def _fewer_jobs(self, jobs: int) -> str | None:
        if jobs <= 1:
            return None
        self.jobs = jobs // 2
        return f"out of memory while preparing {jobs} jobs: now at most {self.jobs} are prepared at a time"

    def _fewer_tokens(self, songs: int, tokens: int) -> str | None:
        if songs <= 1:
            return None
        self.tokens = tokens // 2
        return f"out of memory with {songs} songs in a batch: batches are now limited to {self.tokens} tokens"

    def _fewer_tiles(self) -> str | None:
        smaller = [rung for rung in TILE_RUNGS if rung < self.tiles]
        if not smaller:
            return None
        before, self.tiles = self.tiles, smaller[0]
        return f"out of memory in the VAE decode: now {self.tiles} tiles at a time instead of {before}"
