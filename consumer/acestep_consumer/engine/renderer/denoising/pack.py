# SPDX-License-Identifier: Apache-2.0
"""Sequence packing: the layout of many songs as one sequence without padding. Immutable.

A *branch* is one pass of a song through the DiT under one condition. A turbo song has one branch; a guided song has
two, with and without its condition; a cover blended with its text has one more. A *pack* is branches concatenated.
Each starts at a whole token, so that no token holds frames of two branches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed


class Geometry(NamedTuple):
    """A pack as every DiT block needs it, on the device.

    ``branch``: [tokens], the index of each token's branch. ``cos``, ``sin``: [tokens, head dim]. ``cu_seqlens`` and
    ``condition_cu_seqlens``: cumulative lengths in tokens, [branches + 1], int32. ``max_seqlen`` and
    ``condition_max_seqlen``: tokens.
    """

    branch: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    cu_seqlens: torch.Tensor
    condition_cu_seqlens: torch.Tensor
    max_seqlen: int
    condition_max_seqlen: int


@dataclass(frozen=True, slots=True)
class Grid:
    """A DiT's tokens: ``patch`` latent frames each, with rotary positions (RoPE)."""

    patch: int
    head_dim: int
    theta: float

    def angles(
        self, lengths: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, [tokens, head dim]. Positions start at 0 in each branch."""
        positions = torch.cat([torch.arange(length, dtype=torch.float32) for length in lengths])
        cos, sin = get_1d_rotary_pos_embed(
            self.head_dim, on_device(positions, device), theta=self.theta, use_real=True, repeat_interleave_real=False
        )
        return cos.to(dtype), sin.to(dtype)


@dataclass(frozen=True, slots=True)
class Pack:
    """The layout of branches with ``frames`` latent frames each."""

    frames: tuple[int, ...]
    patch: int
    geometry: Geometry

    @property
    def tokens(self) -> int:
        """Tokens of all branches."""
        return sum(tokens_of(self.frames, self.patch))

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Concatenate [frames, channels] of each branch as [tokens * patch, channels]; a token's rest is zeros."""
        return torch.cat(list(self._padded(parts)))

    def split(self, joined: torch.Tensor) -> list[torch.Tensor]:
        """Undo ``join``: return [frames, channels] of each branch."""
        starts = accumulate((count * self.patch for count in tokens_of(self.frames, self.patch)), initial=0)
        return [joined[start : start + count] for start, count in zip(starts, self.frames, strict=False)]

    def _padded(self, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for part in parts:
            yield part
            if odd := -part.shape[0] % self.patch:
                yield part.new_zeros(odd, part.shape[1])


def tokens_of(frames: Sequence[int], patch: int) -> list[int]:
    """Return the tokens of branches of so many latent frames."""
    return [-(-count // patch) for count in frames]


def lay_out(
    frames: Sequence[int],
    conditions: Sequence[int],
    grid: Grid,
    device: torch.device,
    dtype: torch.dtype,
) -> Pack:
    """Lay out branches of ``frames`` latent frames with conditions of so many tokens.

    An empty branch ends each pack: torch would compile the model again for a batch of one, and so there is none.
    """
    lengths, conditions = [*tokens_of(frames, grid.patch), 0], [*conditions, 0]
    cos, sin = grid.angles(lengths, device, dtype)
    counts = torch.tensor(lengths)
    geometry = Geometry(
        branch=on_device(torch.repeat_interleave(torch.arange(len(lengths)), counts), device),
        cos=cos,
        sin=sin,
        cu_seqlens=_cu_seqlens(lengths, device),
        condition_cu_seqlens=_cu_seqlens(conditions, device),
        max_seqlen=max(lengths),
        condition_max_seqlen=max(conditions),
    )
    return Pack(tuple(frames), grid.patch, geometry)


def _cu_seqlens(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return on_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on the device.

    The host does not wait for the copy: that would be to wait for all that the device has yet to do.
    """
    on_host = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return on_host.to(device, non_blocking=True)
