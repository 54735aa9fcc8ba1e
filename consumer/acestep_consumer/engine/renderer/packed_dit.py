# SPDX-License-Identifier: Apache-2.0
"""The DiT over a packed batch: one forward pass for many songs, whatever their lengths, prompts and time steps.

The weights and layers are those of diffusers' ``AceStepTransformer1DModel``; what differs from its ``forward`` is

* attention: a token attends to its own branch alone (see ``attention``), and positions start at 0 in each branch;
* modulation: every branch has a time step of its own, so that songs may join and leave at any step;
* conditions: their keys and values do not change from step to step, so they are computed once for each song.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn.functional import linear, silu

from acestep_consumer.engine.renderer.attention import NO_WINDOW, attend
from acestep_consumer.engine.renderer.pack import Geometry, Grid, Pack, lay_out


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """Cross-attention keys and values of one condition, for each layer: [layers, 2, tokens, heads, dim]."""

    kv: torch.Tensor

    @property
    def tokens(self) -> int:
        """Length of the condition in tokens."""
        return self.kv.shape[2]


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One pass of a song through the DiT: its latents, under a condition and with a context.

    ``context``: source latents and chunk mask, [frames, 2 * channels]; ``latents``: [frames, channels].
    """

    condition: Condition
    context: torch.Tensor
    latents: torch.Tensor


class PackedDit:
    """A DiT for packed batches.

    Args:
        dit: an ``AceStepTransformer1DModel``; its weights are used where they are.
    """

    def __init__(self, dit: Any) -> None:
        self.dit = dit
        self.patch: int = dit.patch_size
        self.layers = len(dit.layers)
        self._grid = Grid(dit.patch_size, dit.head_dim, dit.rope_theta)
        self._blocks = [PackedBlock(block) for block in dit.layers]

    @property
    def device(self) -> torch.device:
        """The device that the weights are on now."""
        device: torch.device = self.dit.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and latents."""
        dtype: torch.dtype = self.dit.dtype
        return dtype

    def compile(self, backend: Any = "inductor") -> None:
        """Compile the blocks; the first call of each kind of block takes seconds.

        All blocks of a kind share one compilation with symbolic lengths: no later pack is compiled again.
        """
        for block in self._blocks:
            block.compile(dynamic=True, backend=backend)

    def conditions(self, states: Sequence[torch.Tensor]) -> list[Condition]:
        """Compute the keys and values of conditions, each [tokens, width of the condition encoder]."""
        joined = self.dit.condition_embedder(torch.cat(list(states)))
        kv = torch.stack([block.cross_kv(joined) for block in self._blocks])
        # Copies: views would keep the memory of all of them for as long as one is used.
        return [Condition(part.clone()) for part in torch.split(kv, [len(state) for state in states], dim=2)]

    def lay_out(self, frames: Sequence[int], conditions: Sequence[Condition]) -> Pack:
        """Lay out branches of ``frames`` latent frames with these conditions."""
        tokens = [condition.tokens for condition in conditions]
        return lay_out(frames, tokens, self._grid, self.device, self.dtype)

    def velocities(
        self, pack: Pack, latents: torch.Tensor, context: torch.Tensor, kv: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """Predict the velocity of every branch.

        Args:
            pack: the layout.
            latents: noisy latents, [tokens * patch, channels], as ``Pack.join`` returns them.
            context: source latents and chunk mask, [tokens * patch, 2 * channels], joined the same way.
            kv: keys and values of the conditions, concatenated, [layers, 2, condition tokens, heads, dim].
            times: flow time of each branch and of the empty one, [branches + 1], 1 (noise) to 0.

        Returns:
            Velocities, [tokens * patch, channels].
        """
        embedded, modulation = self._modulation(times)
        hidden = self._patchify(torch.cat([context, latents], dim=-1))
        for block, (keys, values) in zip(self._blocks, kv, strict=True):
            hidden = block(hidden, modulation, keys, values, *pack.geometry)
        shift, scale = (self.dit.scale_shift_table + embedded[:, None]).unbind(1)
        branch = pack.geometry.branch
        hidden = (self.dit.norm_out(hidden) * (1 + scale[branch]) + shift[branch]).type_as(hidden)
        return self._unpatchify(hidden)

    def lyric_queries(
        self, pack: Pack, inputs: torch.Tensor, kv: torch.Tensor, times: torch.Tensor, layers: Collection[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the cross-attention's queries of some layers, [tokens, heads, dim], with the layer's index.

        ``inputs``: context and latents, [tokens * patch, 3 * channels]; the other arguments are those of
        ``velocities``. Nothing is computed beyond the last of the layers.
        """
        _, modulation = self._modulation(times)
        hidden = self._patchify(inputs)
        for index in range(max(layers) + 1):
            block, (keys, values) = self._blocks[index], kv[index]
            if index not in layers:
                hidden = block(hidden, modulation, keys, values, *pack.geometry)
                continue
            # Not compiled: a second compilation of the block would take longer than it ever saves.
            hidden, rows = block.after_self_attention(hidden, modulation, pack.geometry)
            yield index, block.cross_query(hidden)
            if index < max(layers):
                hidden = block.after_cross_attention(hidden, rows, keys, values, pack.geometry)

    def scale_of(self, layer: int) -> float:
        """Return the factor on the logits of a layer's cross-attention."""
        scale: float = self.dit.layers[layer].cross_attn.scaling
        return scale

    def _modulation(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the time embedding, [branches, width], and its projection for the blocks, [branches, 6, width]."""
        embedded, modulation = self.dit.time_embed(times)
        # The second embedding is of the step size (mean flow); ordinary sampling leaves it at zero.
        embedded_r, modulation_r = self.dit.time_embed_r(torch.zeros_like(times))
        return embedded + embedded_r, modulation + modulation_r

    def _patchify(self, frames: torch.Tensor) -> torch.Tensor:
        """[tokens * patch, channels] -> [tokens, width]: a convolution with kernel = stride is a linear layer."""
        conv = self.dit.proj_in_conv
        weight = conv.weight.transpose(1, 2).flatten(1)
        return linear(frames.reshape(-1, self.patch * frames.shape[-1]), weight, conv.bias)

    def _unpatchify(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, width] -> [tokens * patch, channels], as ``_patchify``."""
        conv = self.dit.proj_out_conv
        frames = linear(hidden, conv.weight.permute(2, 1, 0).flatten(0, 1)).reshape(-1, conv.out_channels)
        return torch.add(frames, conv.bias)


class PackedBlock(torch.nn.Module):
    """One ``AceStepTransformerBlock`` over a pack."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        window = block.self_attn.sliding_window
        self.window: int = NO_WINDOW if window is None else window

    def cross_kv(self, condition: torch.Tensor) -> torch.Tensor:
        """Return the keys and values of conditions, [tokens, width], as [2, tokens, heads, dim]."""
        attention = self.block.cross_attn
        keys = attention.to_k(condition).unflatten(-1, (attention.kv_heads, attention.head_dim))
        values = attention.to_v(condition).unflatten(-1, (attention.kv_heads, attention.head_dim))
        return torch.stack([attention.norm_k(keys), values])

    def forward(
        self, hidden: torch.Tensor, modulation: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *where: Any
    ) -> torch.Tensor:
        """Transform [tokens, width]; ``where`` is a ``Geometry``, unpacked so that its numbers stay symbolic."""
        geometry = Geometry(*where)
        hidden, rows = self.after_self_attention(hidden, modulation, geometry)
        return self.after_cross_attention(hidden, rows, keys, values, geometry)

    def after_self_attention(
        self, hidden: torch.Tensor, modulation: torch.Tensor, geometry: Geometry
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Do the first part of ``forward``: return the hidden state, and the rows of modulation for the last part."""
        block = self.block
        table = (block.scale_shift_table + modulation).unbind(1)
        shift, scale, gate, *rows = (row[geometry.branch] for row in table)
        normed = (block.self_attn_norm(hidden) * (1 + scale) + shift).type_as(hidden)
        return (hidden + self._self_attention(normed, geometry) * gate).type_as(hidden), tuple(rows)

    def after_cross_attention(
        self,
        hidden: torch.Tensor,
        rows: tuple[torch.Tensor, ...],
        keys: torch.Tensor,
        values: torch.Tensor,
        geometry: Geometry,
    ) -> torch.Tensor:
        """Do the rest of ``forward``."""
        block, (mlp_shift, mlp_scale, mlp_gate) = self.block, rows
        hidden = hidden + self._cross_attention(hidden, keys, values, geometry)
        normed = (block.mlp_norm(hidden) * (1 + mlp_scale) + mlp_shift).type_as(hidden)
        mlp = block.mlp
        lifted: torch.Tensor = mlp.down_proj(silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        return torch.add(hidden, lifted * mlp_gate).type_as(hidden)

    def _self_attention(self, normed: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        attention = self.block.self_attn
        query = attention.norm_q(attention.to_q(normed).unflatten(-1, (attention.heads, attention.head_dim)))
        key = attention.norm_k(attention.to_k(normed).unflatten(-1, (attention.kv_heads, attention.head_dim)))
        value = attention.to_v(normed).unflatten(-1, (attention.kv_heads, attention.head_dim))
        query, key = (_rotated(part, geometry) for part in (query, key))
        cu_seqlens, max_seqlen = geometry.cu_seqlens, geometry.max_seqlen
        attended = attend(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, self.window, attention.scaling
        )
        out: torch.Tensor = attention.to_out[0](attended.flatten(1))
        return out

    def cross_query(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the queries of the cross-attention, [tokens, heads, dim]."""
        attention = self.block.cross_attn
        normed = self.block.cross_attn_norm(hidden).type_as(hidden)
        query: torch.Tensor = attention.norm_q(
            attention.to_q(normed).unflatten(-1, (attention.heads, attention.head_dim))
        )
        return query

    def _cross_attention(
        self, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, geometry: Geometry
    ) -> torch.Tensor:
        """Attend to the conditions."""
        attention = self.block.cross_attn
        attended = attend(
            self.cross_query(hidden),
            keys,
            values,
            geometry.cu_seqlens,
            geometry.condition_cu_seqlens,
            geometry.max_seqlen,
            geometry.condition_max_seqlen,
            NO_WINDOW,
            attention.scaling,
        )
        out: torch.Tensor = attention.to_out[0](attended.flatten(1))
        return out


def _rotated(heads: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Apply RoPE to [tokens, heads, dim]."""
    rotated: torch.Tensor = apply_rotary_emb(
        heads[None], (geometry.cos, geometry.sin), use_real_unbind_dim=-2, sequence_dim=1
    )
    return rotated[0]
