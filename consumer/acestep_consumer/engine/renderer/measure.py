# SPDX-License-Identifier: Apache-2.0
"""What work takes on this device, found out by doing it once at start; it also loads and compiles what work needs."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.packed_dit import PackedDit
from acestep_consumer.policy.memory_budget import TILE_RUNGS, MemoryBudget, MemoryFootprint

# A little more than was seen: allocators round up, and fragments are lost.
_MARGIN = 1.15
_SOUND_COPIES = 2  # as decoded, and at its loudness
_FLOAT32 = 4
_SMALL, _LARGE = 1024, 4096  # tokens of two packs: the difference tells what a token takes
_CONDITION = 90

Say = Callable[[str], None]


def measure(booths: Sequence[ModelRunner], device: torch.device, say: Say) -> MemoryFootprint:
    """Run every model once and return what work takes; zeros where memory cannot be asked for. Takes seconds.

    The first run on a device loads and compiles kernels; with a compiled DiT that takes the better part of a minute,
    and seconds once the compiler's results are on disk.
    """
    for booth in booths:
        _warm_up(booth, say)
    if device.type != "cuda":
        return MemoryFootprint()
    for booth in booths:
        say(f"warming up {booth.parts.model.name}: a song that nobody hears")
        booth.rehearse()
        booth.rest()
    return MemoryFootprint(
        weights=max(_weight_bytes(booth, device) for booth in booths),
        token=max(_token_bytes(booth, device) for booth in booths),
        condition_token=max(_condition_bytes(booth.parts.dit) for booth in booths),
        tile=max(_tile_bytes(booth, device) for booth in booths),
        frame=max(_frame_bytes(booth) for booth in booths),
    )


def _warm_up(booth: ModelRunner, say: Say) -> None:
    name = booth.parts.model.name
    say(f"warming up {name}: the DiT")
    booth.parts.use(booth.parts.dit.dit)
    for tokens in (_SMALL, _SMALL // 2):
        _step(booth.parts.dit, tokens)
    for line in booth.warm():
        say(f"warming up {name}: {line}")
    booth.rest()


def _step(dit: PackedDit, tokens: int) -> torch.Tensor:
    """Run a pack of two voices. All its lengths differ: the compiler takes equal ones for the same."""
    width = dit.dit.config.encoder_hidden_size or dit.dit.config.hidden_size
    channels = dit.dit.config.audio_acoustic_hidden_dim
    conditions = dit.conditions(
        [torch.zeros(count, width, device=dit.device, dtype=dit.dtype) for count in (_CONDITION, 7)]
    )
    shorter = tokens // 3
    frames = [dit.patch * shorter, dit.patch * (tokens - shorter)]
    pack = dit.lay_out(frames, conditions)
    latents = torch.zeros(sum(frames), channels, device=dit.device, dtype=dit.dtype)
    context = torch.cat([latents, latents], dim=-1)
    memory = torch.cat([condition.memory for condition in conditions], dim=2)
    return dit.velocities(pack, latents, context, memory, torch.zeros(3, device=dit.device, dtype=dit.dtype))


def _weight_bytes(booth: ModelRunner, device: torch.device) -> int:
    """All that is loaded; where parts wait in RAM, what is on the card together with the DiT, the largest of them."""
    booth.parts.use(booth.parts.dit.dit)
    return torch.cuda.memory_allocated(device)


def _token_bytes(booth: ModelRunner, device: torch.device) -> int:
    dit = booth.parts.dit
    booth.parts.use(dit.dit)
    small, large = (_peak_of(partial(_step, dit, tokens), device) for tokens in (_SMALL, _LARGE))
    return round(_MARGIN * (large - small) / (_LARGE - _SMALL))


def _tile_bytes(booth: ModelRunner, device: torch.device) -> int:
    tiles = TILE_RUNGS[0]
    booth.parts.use(booth.parts.decoder)
    return round(_MARGIN * _peak_of(lambda: booth.decode_tiles(tiles), device) / tiles)


def _condition_bytes(dit: PackedDit) -> int:
    """Keys and values for each layer, in the song and in the pack that it is in."""
    attention = dit.dit.layers[0].cross_attn
    return 2 * 2 * dit.layers * int(attention.kv_heads * attention.head_dim) * dit.dtype.itemsize


def _frame_bytes(booth: ModelRunner) -> int:
    channels: int = booth.parts.dit.dit.config.audio_acoustic_hidden_dim
    latents = 3 * channels * booth.parts.dtype.itemsize
    sound = booth.parts.decoder.hop * booth.parts.vae.config.audio_channels * _FLOAT32 * _SOUND_COPIES
    return int(latents + sound)


def _peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that work takes beyond what is there before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def budget_for(
    footprint: MemoryFootprint, device: torch.device, share_gb: float | None, max_tokens: int
) -> MemoryBudget:
    """Return what fits: in ``share_gb`` GiB, or in all that is free on the device now."""
    if device.type != "cuda":
        return MemoryBudget(footprint=footprint, max_tokens=max_tokens)
    torch.cuda.empty_cache()  # what the trial runs took, a language model may want
    free, total = torch.cuda.mem_get_info(device)
    limit = free + torch.cuda.memory_reserved(device)
    if share_gb is not None:
        limit = min(limit, round(share_gb * 2**30))
        # Beyond its share the renderer runs out of memory, not its neighbour.
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)
    return MemoryBudget(limit=limit, footprint=footprint, max_tokens=max_tokens)
