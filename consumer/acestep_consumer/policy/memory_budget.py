# SPDX-License-Identifier: Apache-2.0
"""What fits on the card: arithmetic on bytes, measured at start. Pure.

Memory is of three kinds. Weights are there for good. A step works on a pack and a decode on tiles; never at the same
time, so that the larger of the two counts. The rest holds songs: what they are made of while they are denoised, and
their sound until it has been copied away.
"""

from dataclasses import dataclass

TILE_RUNGS = (8, 4, 1)
# Packing gains nothing above this many tokens: the matrix units are busy. More would only make every song wait for all.
ENOUGH_TOKENS = 8192
_AT_LEAST_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFootprint:
    """Bytes that work takes on this device. All zero where there is nothing to measure.

    ``weights``: all models. ``token``: a step's working memory for each token of the pack. ``condition_token``: keys
    and values of a condition, in the song and in the pack. ``tile``: the decode of one tile. ``frame``: a song's
    latents, context and sound for each latent frame.
    """

    weights: int = 0
    token: int = 0
    condition_token: int = 0
    tile: int = 0
    frame: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """How much work may be on the device at once.

    Args:
        limit: bytes that the renderer may use; None: unknown, nothing waits for memory.
        footprint: what work takes.
        max_tokens: tokens of a pack, whatever the memory.
    """

    limit: int | None = None
    footprint: MemoryFootprint = MemoryFootprint()
    max_tokens: int = ENOUGH_TOKENS

    @property
    def free(self) -> int | None:
        """Bytes beside the weights; None without a limit."""
        return None if self.limit is None else max(self.limit - self.footprint.weights, 0)

    @property
    def tokens(self) -> int:
        """Tokens of a pack. A song that has more is a pack of its own."""
        if self.free is None or not self.footprint.token:
            return self.max_tokens
        return max(min(self.max_tokens, self.free // 2 // self.footprint.token), _AT_LEAST_TOKENS)

    @property
    def tiles(self) -> int:
        """Tiles that are decoded together."""
        if self.free is None or not self.footprint.tile:
            return TILE_RUNGS[0]
        return next((rung for rung in TILE_RUNGS if rung * self.footprint.tile <= self.free // 2), TILE_RUNGS[-1])

    @property
    def working(self) -> int:
        """Bytes of the largest step or decode."""
        return max(self.tokens * self.footprint.token, self.tiles * self.footprint.tile)

    def held(self, frames: int, condition_tokens: int) -> int:
        """Bytes that a song of so many latent frames holds, with all its conditions' tokens."""
        return frames * self.footprint.frame + condition_tokens * self.footprint.condition_token

    def has_room(self, held: int, more: int) -> bool:
        """Whether a song of ``more`` bytes fits beside others that hold ``held``. A song alone is tried in any case."""
        return self.free is None or held + more + self.working <= self.free
