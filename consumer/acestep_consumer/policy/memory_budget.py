# SPDX-License-Identifier: Apache-2.0
"""The renderer's memory budget, calculated from footprints that are measured at start. Pure.

Three kinds of memory. Weights stay on the GPU. Working memory is for a denoising step on a batch or a decode of tiles;
these never run at the same time, so the larger one counts. The rest holds the songs: their latents and conditions while
they are denoised, and their audio until it has been copied to the host.
"""

from dataclasses import dataclass
from typing import Final, Self

TILE_RUNGS = (8, 4, 1)
# Above this many tokens the matrix units are saturated: larger batches only add latency.
ENOUGH_TOKENS = 8192
_AT_LEAST_TOKENS = 512

PACKS: Final = 3
"""Batches that the renderer's stage holds: one on the device, one prepared, and one on its way there."""

_ROOMY_GB = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGraphLimits:
    """The largest pack that is stepped by a CUDA graph. Its inputs have memory of their own, beside the weights.

    Attributes:
        tokens: of all branches; each takes 1.3 KB, and 50 KB in a graph that was captured, for a 2B model.
        condition_tokens: of all conditions; each takes 100 KB.
    """

    tokens: int
    condition_tokens: int

    @classmethod
    def on_a_device_with(cls, vram_gb: float) -> Self:
        """Return the limits for a device with so much memory.

        Where memory is scarce, packs that take longer to compute than to launch do without.
        """
        if vram_gb < _ROOMY_GB:
            return cls(tokens=2304, condition_tokens=1024)
        return cls(tokens=ENOUGH_TOKENS, condition_tokens=4608)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFootprint:
    """Bytes used on this device; all zero if nothing can be measured.

    ``weights``: all models. ``token``: working memory of a step per token of the batch. ``condition_token``: keys and
    values of a condition token, in the song and in the batch. ``tile``: decoding one tile. ``frame``: a song's latents,
    context and audio per latent frame.
    """

    weights: int = 0
    token: int = 0
    condition_token: int = 0
    tile: int = 0
    frame: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """The amount of work that fits on the device at once.

    Args:
        limit: bytes that the renderer may use; None: unknown, nothing waits for memory.
        footprint: bytes used.
        max_tokens: most tokens of a batch, whatever the memory.
    """

    limit: int | None = None
    footprint: MemoryFootprint = MemoryFootprint()
    max_tokens: int = ENOUGH_TOKENS

    @property
    def free(self) -> int | None:
        """Bytes left beside the weights; None without a limit."""
        return None if self.limit is None else max(self.limit - self.footprint.weights, 0)

    @property
    def tokens(self) -> int:
        """Most tokens of a batch. A song with more is a batch of its own."""
        if self.free is None or not self.footprint.token:
            return self.max_tokens
        return max(min(self.max_tokens, self.free // 2 // self.footprint.token), _AT_LEAST_TOKENS)

    @property
    def tiles(self) -> int:
        """Number of tiles decoded together."""
        if self.free is None or not self.footprint.tile:
            return TILE_RUNGS[0]
        return next((rung for rung in TILE_RUNGS if rung * self.footprint.tile <= self.free // 2), TILE_RUNGS[-1])

    @property
    def working(self) -> int:
        """Bytes of the largest step or decode."""
        return max(self.tokens * self.footprint.token, self.tiles * self.footprint.tile)

    @property
    def least_working(self) -> int:
        """Bytes of the smallest step or decode."""
        return max(_AT_LEAST_TOKENS * self.footprint.token, TILE_RUNGS[-1] * self.footprint.tile)

    def held(self, frames: int, condition_tokens: int) -> int:
        """Return the bytes of a song with ``frames`` latent frames and ``condition_tokens`` over all its conditions."""
        return frames * self.footprint.frame + condition_tokens * self.footprint.condition_token

    def has_room(self, held: int, more: int) -> bool:
        """Whether a song of ``more`` bytes fits beside others of ``held`` bytes. A single song is tried in any case."""
        return self.free is None or held + more + self.working <= self.free
