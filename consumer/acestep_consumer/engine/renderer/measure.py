# SPDX-License-Identifier: Apache-2.0
"""Warm-up and memory measurement: every kind of work is done once at start, which also loads and compiles kernels."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from acestep_consumer.engine.renderer.denoising.packed_dit import PackedDit
from acestep_consumer.engine.renderer.lyrics.medians import kernels_ready_after
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.policy.memory_budget import TILE_RUNGS, MemoryBudget, MemoryFootprint

# More than was measured: allocators round up, and fragments are lost.
_MARGIN = 1.15
_AUDIO_COPIES = 2  # as decoded, and normalised
_FLOAT32 = 4
_SMALL, _LARGE = 1024, 4096  # tokens of two packs: their difference gives the memory of a token
_CONDITION = 90

Notify = Callable[[str], None]


def measure(runners: Sequence[ModelRunner], device: torch.device, notify: Notify) -> MemoryFootprint:
    """Run every model once and return the memory that work takes; zeros where it cannot be measured. Takes seconds.

    The first run on a device loads and compiles kernels; with a compiled DiT that takes the better part of a minute,
    and seconds once the compiler's results are on disk.
    """
    with kernels_ready_after(device):
        for runner in runners:
            _warm_up(runner, notify)
    if device.type != "cuda":
        return MemoryFootprint()
    for runner in runners:
        notify(f"warming up {runner.parts.model.name}: a short song")
        runner.render_warm_up()
        runner.unload()
    return MemoryFootprint(
        weights=max(_weight_bytes(runner, device) for runner in runners),
        token=max(_token_bytes(runner, device) for runner in runners),
        condition_token=max(_condition_bytes(runner.parts.dit) for runner in runners),
        tile=max(_tile_bytes(runner, device) for runner in runners),
        frame=max(_frame_bytes(runner) for runner in runners),
    )


def _warm_up(runner: ModelRunner, notify: Notify) -> None:
    name = runner.parts.model.name
    notify(f"warming up {name}: the DiT")
    runner.parts.use(runner.parts.dit.dit)
    for tokens in (_SMALL, _SMALL // 2):
        _step(runner.parts.dit, tokens)
    for line in runner.warm_up():
        notify(f"warming up {name}: {line}")
    runner.unload()


def _step(dit: PackedDit, tokens: int) -> torch.Tensor:
    """Run a pack of two branches of different lengths: the compiler would treat equal ones as one symbol."""
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
    kv = torch.cat([condition.kv for condition in conditions], dim=2)
    return dit.velocities(pack, latents, context, kv, torch.zeros(3, device=dit.device, dtype=dit.dtype))


def _weight_bytes(runner: ModelRunner, device: torch.device) -> int:
    """Return the bytes of all loaded weights; with offloading, those on the device together with the DiT."""
    runner.parts.use(runner.parts.dit.dit)
    return torch.cuda.memory_allocated(device)


def _token_bytes(runner: ModelRunner, device: torch.device) -> int:
    dit = runner.parts.dit
    runner.parts.use(dit.dit)
    small, large = (_peak_of(partial(_step, dit, tokens), device) for tokens in (_SMALL, _LARGE))
    return round(_MARGIN * (large - small) / (_LARGE - _SMALL))


def _tile_bytes(runner: ModelRunner, device: torch.device) -> int:
    tiles = TILE_RUNGS[0]
    runner.parts.use(runner.parts.decoder)
    return round(_MARGIN * _peak_of(lambda: runner.decode_silence(tiles), device) / tiles)


def _condition_bytes(dit: PackedDit) -> int:
    """Return the bytes of a condition token: keys and values for each layer, in the sample and in its pack."""
    attention = dit.dit.layers[0].cross_attn
    return 2 * 2 * dit.layers * int(attention.kv_heads * attention.head_dim) * dit.dtype.itemsize


def _frame_bytes(runner: ModelRunner) -> int:
    channels: int = runner.parts.dit.dit.config.audio_acoustic_hidden_dim
    latents = 3 * channels * runner.parts.dtype.itemsize
    audio = runner.parts.decoder.hop * runner.parts.vae.config.audio_channels * _FLOAT32 * _AUDIO_COPIES
    return int(latents + audio)


def _peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that work allocates at its peak."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def budget_for(
    footprint: MemoryFootprint, device: torch.device, share_gb: float | None, max_tokens: int
) -> MemoryBudget:
    """Return the budget of ``share_gb`` GiB, or of all that is free on the device now."""
    if device.type != "cuda":
        return MemoryBudget(footprint=footprint, max_tokens=max_tokens)
    torch.cuda.empty_cache()  # frees the measurements' memory for the language model
    free, total = torch.cuda.mem_get_info(device)
    limit = free + torch.cuda.memory_reserved(device)
    if share_gb is not None:
        limit = min(limit, round(share_gb * 2**30))
        # Beyond its share the renderer itself runs out of memory, not another process on the device.
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)
    return MemoryBudget(limit=limit, footprint=footprint, max_tokens=max_tokens)
