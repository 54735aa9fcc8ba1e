# SPDX-License-Identifier: Apache-2.0
"""Where everything lies when many songs are one sequence. Pure geometry; the DiT reads it, nothing changes it.

Words: a *voice* is one pass of a song through the DiT under one condition. A turbo song has one voice; a guided song
has two, with and without its condition; a cover blended with its text has one more. A pack is voices end to end. Each
starts at a whole token, so that no token holds frames of two voices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed


class Geometry(NamedTuple):
    """What every block needs to know of a pack, on the device.

    ``voice``: [tokens], the number of each token's voice. ``cos``, ``sin``: [tokens, head dim]. ``bounds`` and
    ``condition_bounds``: [voices + 1], int32. ``longest`` and ``longest_condition``: tokens.
    """

    voice: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    bounds: torch.Tensor
    condition_bounds: torch.Tensor
    longest: int
    longest_condition: int


@dataclass(frozen=True, slots=True)
class Grid:
    """How a DiT sees a song: ``patch`` frames are a token, and positions are angles (RoPE)."""

    patch: int
    head_dim: int
    theta: float

    def angles(
        self, lengths: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, [tokens, head dim]. Each voice counts from 0, as it does alone."""
        positions = torch.cat([torch.arange(length, dtype=torch.float32) for length in lengths])
        cos, sin = get_1d_rotary_pos_embed(
            self.head_dim, positions.to(device), theta=self.theta, use_real=True, repeat_interleave_real=False
        )
        return cos.to(dtype), sin.to(dtype)


@dataclass(frozen=True, slots=True)
class Pack:
    """The layout of voices with ``frames`` latent frames each: which frames and tokens are whose."""

    frames: tuple[int, ...]
    patch: int
    geometry: Geometry

    @property
    def tokens(self) -> int:
        """Tokens of all voices."""
        return sum(tokens_of(self.frames, self.patch))

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Lay [frames, channels] of each voice end to end as [tokens * patch, channels]; odd ends are zeros."""
        return torch.cat(list(self._with_filling(parts)))

    def split(self, joined: torch.Tensor) -> list[torch.Tensor]:
        """Undo ``join``: return [frames, channels] of each voice."""
        starts = accumulate((count * self.patch for count in tokens_of(self.frames, self.patch)), initial=0)
        return [joined[start : start + count] for start, count in zip(starts, self.frames, strict=False)]

    def _with_filling(self, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for part in parts:
            yield part
            if odd := -part.shape[0] % self.patch:
                yield part.new_zeros(odd, part.shape[1])


def tokens_of(frames: Sequence[int], patch: int) -> list[int]:
    """Return the tokens that voices of so many frames make."""
    return [-(-count // patch) for count in frames]


def lay_out(
    frames: Sequence[int],
    conditions: Sequence[int],
    grid: Grid,
    device: torch.device,
    dtype: torch.dtype,
) -> Pack:
    """Lay out voices of ``frames`` latent frames with conditions of so many tokens.

    A voice without tokens ends each pack: torch compiles a model anew for a batch of one, and so there is none.
    """
    lengths, conditions = [*tokens_of(frames, grid.patch), 0], [*conditions, 0]
    cos, sin = grid.angles(lengths, device, dtype)
    counts = torch.tensor(lengths)
    geometry = Geometry(
        voice=torch.repeat_interleave(torch.arange(len(lengths)), counts).to(device),
        cos=cos,
        sin=sin,
        bounds=_bounds(lengths, device),
        condition_bounds=_bounds(conditions, device),
        longest=max(lengths),
        longest_condition=max(conditions),
    )
    return Pack(tuple(frames), grid.patch, geometry)


def _bounds(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
