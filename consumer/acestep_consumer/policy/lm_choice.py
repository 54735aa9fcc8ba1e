# SPDX-License-Identifier: Apache-2.0
"""Chooses the 5Hz LM for a GPU, its backend and its share of the memory. Pure.

The worker, ``doctor`` and ``plan`` ask the same function with the same request (``engine.planner.registry``).
"""

from dataclasses import dataclass
from typing import Literal

from acestep_consumer.policy.tiers import LM_MEMORY_GB, LMS, OFFLOAD_BELOW_GB, Tier

Backend = Literal["vllm", "pt"]

SHARE_ABOVE_GB = 0.4
"""Of the memory beyond 24 GB, this share goes to the LM's key-value cache, for more concurrent sequences."""

RENDERER_GB, OFFLOADED_RENDERER_GB = 7.0, 4.5
"""The minimum for a renderer with a 2B model: its weights (offloaded: the DiT's only) and one song."""

RESERVE_GB = 1.0
"""Reserved for the renderer's CUDA context and fragmentation. An allowance, not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LmRequest:
    """The operator's settings, and the LMs that can be had. None: decided by the GPU's tier.

    Attributes:
        init: True: required; False: none.
        model: a name, a folder or a hub id.
        backend: None: vLLM if installed, else transformers.
        on_disk: names of ACE-Step's LMs that are on the disk; None: not known, as for a GPU of another machine.
        on_hub: names of those that can be downloaded.
    """

    init: bool | None = None
    model: str | None = None
    backend: Backend | None = None
    on_disk: frozenset[str] | None = None
    on_hub: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class LmPlan:
    """The LM to load. ``backend`` None: vLLM if installed, else transformers. ``memory_gb``: its whole budget."""

    model: str
    backend: Backend | None
    memory_gb: float
    required: bool
    warnings: tuple[str, ...] = ()


def plan_lm(wish: LmRequest, tier: Tier, vram_gb: float) -> LmPlan | None:
    """Choose the LM for a GPU, or none.

    The tier's largest LM is the upper bound. By default it is the largest one that leaves enough memory for the
    renderer, of those on the disk; where none of these is on the disk, of those that can be downloaded.
    """
    wanted = tier.lm_by_default if wish.init is None else wish.init
    if not wanted:
        return None
    if wish.model is None:
        model, warnings = _default(wish, tier, vram_gb)
    else:
        model, warnings = _named(wish.model, tier)
    return LmPlan(
        model=model,
        backend=wish.backend,
        memory_gb=_memory(model, vram_gb),
        required=wish.init is True,
        warnings=warnings,
    )


def renderer_share(plan: LmPlan, vram_gb: float) -> float:
    """Return the GB left for the renderer on the same GPU."""
    return max(vram_gb - plan.memory_gb - RESERVE_GB, 0.0)


def _named(asked: str, tier: Tier) -> tuple[str, tuple[str, ...]]:
    """Return the LM that the operator named, unless it is larger than the tier allows."""
    largest = tier.lms[-1] if tier.lms else LMS[0]
    name = asked.rstrip("/").rsplit("/", 1)[-1]
    if name not in LMS or name in tier.lms or name == largest:
        return asked, ()  # allowed by the tier, or a custom LM of unknown size
    return largest, (f"ACESTEP_LM_MODEL_PATH = {asked}: too large for {tier.name}; {largest} is used",)


def _default(wish: LmRequest, tier: Tier, vram_gb: float) -> tuple[str, tuple[str, ...]]:
    """Return the LM for an operator who named none, and a warning where it is not the largest that fits."""
    fitting = _that_leave_room(tier.lms or LMS[:1], vram_gb)
    best = fitting[-1]
    if wish.on_disk is None or best in wish.on_disk:
        return best, ()
    here = [model for model in LMS if model in wish.on_disk]
    usable = [model for model in here if model in fitting]
    if usable:
        return usable[-1], (f"{usable[-1]} is used: {best} would fit too, but is not on the disk",)
    if here and not vram_gb:
        return here[0], ()  # on a CPU it takes RAM, of which the tiers say nothing
    unusable = f" ({', '.join(here)}: too large for {tier.name} with {vram_gb:.3g} GB)" if here else ""
    missing = f"no language model for this GPU is on the disk{unusable}"
    downloadable = [model for model in fitting if model in wish.on_hub]
    if downloadable:
        return downloadable[-1], (f"{missing}: {downloadable[-1]} is downloaded",)
    return best, (f"{missing}: put {' or '.join(fitting)} into ACESTEP_CHECKPOINT_DIR",)


def _that_leave_room(models: tuple[str, ...], vram_gb: float) -> tuple[str, ...]:
    """Return the LMs that leave enough memory for the renderer, smallest first; if none does, the smallest."""
    needed = RENDERER_GB if vram_gb >= OFFLOAD_BELOW_GB else OFFLOADED_RENDERER_GB
    room = vram_gb - RESERVE_GB - needed
    return tuple(model for model in models if _memory(model, vram_gb) <= room) or models[:1]


def _memory(model: str, vram_gb: float) -> float:
    name = model.rstrip("/").rsplit("/", 1)[-1]
    base = LM_MEMORY_GB.get(name, max(LM_MEMORY_GB.values()))
    return base + max(0.0, vram_gb - 24) * SHARE_ABOVE_GB
