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

from acestep_consumer.engine.renderer.denoising.attention import NO_WINDOW, attend
from acestep_consumer.engine.renderer.denoising.pack import Geometry, Grid, Pack, lay_out


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

    def join_cross_weights(self) -> None:
        """Lay the weights of all layers' cross keys and values out one after the other, so that one product has them.

        The layers' own weights become views of that memory. Whatever replaces them later (offloading, a LoRA) undoes
        it: ``conditions`` looks where they are.
        """
        weights = self._cross_weights()
        if all(type(weight.data) is torch.Tensor and weight.shape == weights[0].shape for weight in weights):
            for weight, view in zip(weights, torch.stack([each.data for each in weights]), strict=True):
                weight.data = view

    def conditions(self, states: Sequence[torch.Tensor]) -> list[Condition]:
        """Compute the keys and values of conditions, each [tokens, width of the condition encoder]."""
        joined, lengths = self.dit.condition_embedder(torch.cat(list(states))), [len(state) for state in states]
        if (weights := _consecutive(self._cross_weights())) is not None and not self._has_cross_bias():
            return [Condition(self._cross_kv(part, weights)) for part in torch.split(joined, lengths)]
        kv = torch.stack([block.cross_kv(joined) for block in self._blocks])
        # Copies: views would keep the memory of all of them for as long as one is used.
        return [Condition(part.clone()) for part in torch.split(kv, lengths, dim=2)]

    def _cross_kv(self, condition: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return what ``PackedBlock.cross_kv`` returns, of all layers: [layers, 2, tokens, heads, dim].

        A layer at a time takes eleven launches a layer, longer than the device computes.
        """
        norms = [block.block.cross_attn.norm_k for block in self._blocks]
        first = self._blocks[0].block.cross_attn
        joined = linear(condition, weights).view(-1, self.layers, 2, first.kv_heads, first.head_dim)
        keys, values = joined.movedim(0, 2).unbind(1)
        # As diffusers' RMSNorm: the variance in float32, the product in the weights' precision.
        variance = keys.to(torch.float32).pow(2).mean(-1, keepdim=True)
        keys = (keys * torch.rsqrt(variance + norms[0].eps)).to(norms[0].weight.dtype)
        return torch.stack([keys * torch.stack([norm.weight for norm in norms])[:, None, None], values], dim=1)

    def _cross_weights(self) -> list[torch.nn.Parameter]:
        attentions = [block.block.cross_attn for block in self._blocks]
        return [projection.weight for attention in attentions for projection in (attention.to_k, attention.to_v)]

    def _has_cross_bias(self) -> bool:
        return self._blocks[0].block.cross_attn.to_k.bias is not None

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
            hidden = block(hidden, modulation, keys, values, *pack.geometry)[0]
        shift, scale = (self.dit.scale_shift_table + embedded[:, None]).unbind(1)
        branch = pack.geometry.branch
        hidden = (self.dit.norm_out(hidden) * (1 + scale[branch]) + shift[branch]).type_as(hidden)
        return self._unpatchify(hidden)

    def lyric_queries(
        self, pack: Pack, inputs: torch.Tensor, kv: torch.Tensor, times: torch.Tensor, layers: Collection[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the cross-attention's queries of some layers, [tokens, heads, dim], with the layer's index.

        ``inputs``: context and latents, [tokens * patch, 3 * channels]; the other arguments are those of
        ``velocities``, of ``kv`` the layers up to the last one. Nothing is computed beyond the last of the layers.
        """
        _, modulation = self._modulation(times)
        hidden = self._patchify(inputs)
        last = max(layers)
        for index, (block, (keys, values)) in enumerate(zip(self._blocks[:last], kv[:last], strict=True)):
            hidden, query = block(hidden, modulation, keys, values, *pack.geometry)
            if index in layers:
                yield index, query
        # Half of a block, not compiled: another compilation would take longer than it ever saves.
        hidden, _ = self._blocks[last].after_self_attention(hidden, modulation, pack.geometry)
        yield last, self._blocks[last].cross_query(hidden)

    @property
    def cross_scale(self) -> float:
        """The factor on the logits of the cross-attention, in all layers."""
        scale: float = self.dit.layers[0].cross_attn.scaling
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


def _consecutive(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return weights of one shape as one, [all rows, columns], without a copy; None where they do not lie so."""
    first, size = weights[0], weights[0].numel()
    if any(type(weight.data) is not torch.Tensor or not weight.is_contiguous() for weight in weights):
        return None  # quantized ones, for example
    start, memory = first.storage_offset(), first.untyped_storage().data_ptr()
    for index, weight in enumerate(weights):
        place = (weight.untyped_storage().data_ptr(), weight.storage_offset(), weight.shape)
        if place != (memory, start + index * size, first.shape):
            return None
    rows, columns = first.shape
    return first.as_strided((len(weights) * rows, columns), (columns, 1), start)


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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform [tokens, width]; ``where`` is a ``Geometry``, unpacked so that its numbers stay symbolic.

        Also returned are the queries of the cross-attention, [tokens, heads, dim], which are in memory in any case: one
        compilation serves steps and the alignment of lyrics.
        """
        geometry = Geometry(*where)
        hidden, rows = self.after_self_attention(hidden, modulation, geometry)
        query = self.cross_query(hidden)
        hidden = hidden + self._cross_attention(query, keys, values, geometry)
        return self._after_mlp(hidden, *rows), query

    def after_self_attention(
        self, hidden: torch.Tensor, modulation: torch.Tensor, geometry: Geometry
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Do the first part of ``forward``: return the hidden state, and the rows of modulation for the last part."""
        block = self.block
        table = (block.scale_shift_table + modulation).unbind(1)
        shift, scale, gate, *rows = (row[geometry.branch] for row in table)
        normed = (block.self_attn_norm(hidden) * (1 + scale) + shift).type_as(hidden)
        return (hidden + self._self_attention(normed, geometry) * gate).type_as(hidden), tuple(rows)

    def _after_mlp(
        self, hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        mlp = self.block.mlp
        normed = (self.block.mlp_norm(hidden) * (1 + scale) + shift).type_as(hidden)
        lifted: torch.Tensor = mlp.down_proj(silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        return torch.add(hidden, lifted * gate).type_as(hidden)

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
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, geometry: Geometry
    ) -> torch.Tensor:
        """Attend to the conditions."""
        attention = self.block.cross_attn
        attended = attend(
            query,
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
