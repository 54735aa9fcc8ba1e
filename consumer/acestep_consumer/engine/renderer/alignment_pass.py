# SPDX-License-Identifier: Apache-2.0
"""The DiT pass that aligns lyrics: one more conditional pass for denoised songs that ask for it, packed like a step.

Each song is noised a little again; what a few heads of its cross-attention then attend to is kept for the tokens of its
lyrics. The pass ends at the last layer that has such a head. As in ACE-Step, the noise is the same for every song.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Final

import torch

from acestep_consumer.engine.renderer.attention import weights_of
from acestep_consumer.engine.renderer.lyric_alignment import AlignmentHeads, AlignmentRequest, HeadSums
from acestep_consumer.engine.renderer.pack import on_device, tokens_of
from acestep_consumer.engine.renderer.packed_dit import PackedDit
from acestep_consumer.engine.renderer.sample import Sample

_SEED: Final = 42


def alignment_matrices(
    dit: PackedDit, samples: Sequence[tuple[Sample, AlignmentRequest]], heads: AlignmentHeads
) -> list[torch.Tensor]:
    """Return each song's matrices, [2, tokens, frames] as ``HeadSums.matrices`` does, on the device.

    The songs are denoised. Beside the hidden states it takes about six matrices of [condition tokens, frames] in
    float32 at a time, of one song and one head: 0.4 GB for a song of 600 s with 2,300 tokens, 60 MB for usual ones.
    Neither a step nor a decode runs at the time, so that this is within the budget's working memory.
    """
    songs = [sample for sample, _ in samples]
    sums = [HeadSums() for _ in samples]
    pack = dit.lay_out([song.frames for song in songs], [song.condition for song in songs])
    latents = pack.join([_noised(sample, request.time) for sample, request in samples])
    inputs = torch.cat([pack.join([song.context for song in songs]), latents], dim=-1)
    kv = torch.cat([song.condition.kv for song in songs], dim=2)
    times = on_device(torch.tensor([*(request.time for _, request in samples), 0.0], dtype=dit.dtype), dit.device)
    starts = [0, *torch.tensor(tokens_of([song.frames for song in songs], dit.patch)).cumsum(0).tolist()]
    for layer, queries in dit.lyric_queries(pack, inputs, kv, times, heads):
        for (sample, request), (start, end), total in zip(samples, pairwise(starts), sums, strict=True):
            heard = -(-(sample.heard_frames or sample.frames) // dit.patch)
            keys = sample.condition.kv[layer, 0]
            for head in heads[layer]:
                weights = weights_of(queries[start : min(start + heard, end)], keys, head, dit.scale_of(layer))
                total.add(weights[:, request.lyrics.span].mT.contiguous()[None])
    return [total.matrices() for total in sums]


def _noised(sample: Sample, time: float) -> torch.Tensor:
    noise = on_device(alignment_noise(*sample.latents.shape), sample.latents.device)
    latents = sample.latents
    return (time * noise + (1.0 - time) * latents.float()).to(latents.dtype)


@lru_cache(maxsize=16)
def alignment_noise(frames: int, channels: int) -> torch.Tensor:
    """Return the noise of a song of this length, float32 [frames, channels] on the CPU."""
    return torch.randn(1, frames, channels, generator=torch.Generator().manual_seed(_SEED))[0]
