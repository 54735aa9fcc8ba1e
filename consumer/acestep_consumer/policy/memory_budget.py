# SPDX-License-Identifier: Apache-2.0
"""The renderer's memory budget, calculated from footprints that are measured at start. Pure.

Three kinds of memory. Weights stay on the GPU. Working memory is for a denoising step on a batch or a decode of tiles;
these never run at the same time, so the larger one counts. The rest holds the songs: their latents and conditions while
they are denoised, and their audio until it has been copied to the host.
"""

from dataclasses import dataclass

TILE_RUNGS = (8, 4, 1)
# Above this many tokens the matrix units are saturated: larger batches only add latency.
ENOUGH_TOKENS = 8192
_AT_LEAST_TOKENS = 512


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

    def held(self, frames: int, condition_tokens: int) -> int:
        """Return the bytes of a song with ``frames`` latent frames and ``condition_tokens`` over all its conditions."""
        return frames * self.footprint.frame + condition_tokens * self.footprint.condition_token

    def has_room(self, held: int, more: int) -> bool:
        """Whether a song of ``more`` bytes fits beside others of ``held`` bytes. A single song is tried in any case."""
        return self.free is None or held + more + self.working <= self.free
