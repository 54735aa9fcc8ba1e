# SPDX-License-Identifier: Apache-2.0
"""How much the device is asked at once. It steps down when memory runs out, and stays down: that shape has failed."""

from dataclasses import dataclass
from enum import Enum

from acestep_consumer.policy.memory_budget import TILE_RUNGS, MemoryBudget


class DeviceStage(Enum):
    """What the device was doing."""

    PREPARE = "prepare"
    STEP = "step"
    DECODE = "decode"


@dataclass(slots=True)
class Degradation:
    """``tokens`` of a pack, ``tiles`` of a decode, ``jobs`` prepared together; ``squeezes``: times it went down."""

    tokens: int
    tiles: int
    jobs: int = 16
    squeezes: int = 0

    @classmethod
    def of(cls, budget: MemoryBudget) -> "Degradation":
        """Return what the budget allows."""
        return cls(tokens=budget.tokens, tiles=budget.tiles)

    def step_down(self, stage: DeviceStage, members: int, tokens: int) -> str | None:
        """Ask for less after ``stage`` ran out of memory with so many members and tokens.

        Returns what was done, in words for the job's event, or None when nothing is left to give up here.
        """
        match stage:
            case DeviceStage.PREPARE:
                done = self._fewer_jobs(members)
            case DeviceStage.STEP:
                done = self._fewer_tokens(members, tokens)
            case DeviceStage.DECODE:
                done = self._fewer_tiles()
        self.squeezes += done is not None
        return done

    def _fewer_jobs(self, jobs: int) -> str | None:
        if jobs <= 1:
            return None
        self.jobs = jobs // 2
        return f"memory ran out while {jobs} jobs were prepared: at most {self.jobs} at a time from now on"

    def _fewer_tokens(self, songs: int, tokens: int) -> str | None:
        if songs <= 1:
            return None
        self.tokens = tokens // 2
        return f"memory ran out with {songs} songs in a pack: at most {self.tokens} tokens at a time from now on"

    def _fewer_tiles(self) -> str | None:
        smaller = [rung for rung in TILE_RUNGS if rung < self.tiles]
        if not smaller:
            return None
        before, self.tiles = self.tiles, smaller[0]
        return f"memory ran out in the decode: {self.tiles} tiles at a time from now on, not {before}"
