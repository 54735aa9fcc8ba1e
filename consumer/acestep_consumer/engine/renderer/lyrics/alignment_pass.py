# SPDX-License-Identifier: Apache-2.0
"""The DiT pass that aligns lyrics: one more conditional pass for denoised songs that ask for it, packed like a step.

Each song is noised a little again; what a few heads of its cross-attention then attend to is kept for the tokens of its
lyrics. The pass ends at the last layer that has such a head. As in ACE-Step, the noise is the same for every song.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import torch

from acestep_consumer.engine.renderer.denoising.attention import weights_of
from acestep_consumer.engine.renderer.denoising.pack import on_device, tokens_of
from acestep_consumer.engine.renderer.denoising.packed_dit import PackedDit
from acestep_consumer.engine.renderer.denoising.sample import Sample
from acestep_consumer.engine.renderer.lyrics.lyric_alignment import AlignmentHeads, AlignmentRequest, HeadSums

_SEED: Final = 42
_MOST_CELLS: Final = 20_000_000
"""Condition tokens by frames of as many heads as are done at once: all seven, for a song of 300 s."""


def alignment_matrices(
    dit: PackedDit, samples: Sequence[tuple[Sample, AlignmentRequest]], heads: AlignmentHeads
) -> list[torch.Tensor]:
    """Return each song's matrices, [2, tokens, frames] as ``HeadSums.matrices`` does, on the device.

    The songs are denoised. Beside the hidden states it takes about six matrices of ``_MOST_CELLS`` numbers at a time,
    or of one head: 0.5 GB. Neither a step nor a decode runs at the time, so that this is within the budget's working
    memory.
    """
    songs = [sample for sample, _ in samples]
    pack = dit.lay_out([song.frames for song in songs], [song.condition for song in songs])
    latents = pack.join([_noised(sample, request.time) for sample, request in samples])
    inputs = torch.cat([pack.join([song.context for song in songs]), latents], dim=-1)
    kv = torch.cat([song.condition.kv[: max(heads) + 1] for song in songs], dim=2)
    times = on_device(torch.tensor([*(request.time for _, request in samples), 0.0], dtype=dit.dtype), dit.device)
    queries = torch.stack(
        [
            query[:, head].float()
            for layer, query in dit.lyric_queries(pack, inputs, kv, times, heads)
            for head in heads[layer]
        ]
    )
    return [
        _matrices(own[:, : -(-(sample.heard_frames or sample.frames) // dit.patch)], dit, sample, request, heads)
        for own, (sample, request) in zip(
            torch.split(queries, tokens_of([song.frames for song in songs], dit.patch), dim=1), samples, strict=True
        )
    ]


def _matrices(
    queries: torch.Tensor, dit: PackedDit, sample: Sample, request: AlignmentRequest, heads: AlignmentHeads
) -> torch.Tensor:
    """Return the matrices of one song, given the queries of all heads in its heard frames, [heads, frames, dim]."""
    kv = sample.condition.kv
    shared = dit.dit.layers[0].cross_attn.heads // kv.shape[3]
    keys = torch.stack([kv[layer, 0, :, head // shared] for layer in sorted(heads) for head in heads[layer]]).float()
    at_once = max(1, _MOST_CELLS // (queries.shape[1] * keys.shape[1]))
    sums = HeadSums()
    for some, theirs in zip(torch.split(queries, at_once), torch.split(keys, at_once), strict=True):
        weights = weights_of(some, theirs, dit.cross_scale)
        sums.add(weights[:, :, request.lyrics.span].mT)
    return sums.matrices()


def _noised(sample: Sample, time: float) -> torch.Tensor:
    noise = on_device(alignment_noise(*sample.latents.shape), sample.latents.device)
    latents = sample.latents
    return (time * noise + (1.0 - time) * latents.float()).to(latents.dtype)


@lru_cache(maxsize=16)
def alignment_noise(frames: int, channels: int) -> torch.Tensor:
    """Return the noise of a song of this length, float32 [frames, channels] on the CPU."""
    return torch.randn(1, frames, channels, generator=torch.Generator().manual_seed(_SEED))[0]
