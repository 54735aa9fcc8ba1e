# SPDX-License-Identifier: Apache-2.0
"""Chooses the 5Hz LM for a GPU, its backend and its share of the memory. Pure."""

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
    """The operator's settings; None: decided by the GPU's tier. ``init`` True: required, False: none."""

    init: bool | None = None
    model: str | None = None
    backend: Backend | None = None


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

    The tier's largest LM is the upper bound, and the default if it leaves enough memory for the renderer.
    """
    wanted = tier.lm_by_default if wish.init is None else wish.init
    if not wanted:
        return None
    model, warnings = _model(wish.model, tier, vram_gb)
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


def _model(asked: str | None, tier: Tier, vram_gb: float) -> tuple[str, tuple[str, ...]]:
    largest = tier.lms[-1] if tier.lms else LMS[0]
    if asked is None:
        return _largest_that_leaves_room(tier.lms or LMS[:1], vram_gb), ()
    name = asked.rstrip("/").rsplit("/", 1)[-1]
    if name not in LMS or name in tier.lms or name == largest:
        return asked, ()  # allowed by the tier, or a custom LM of unknown size
    return largest, (f"ACESTEP_LM_MODEL_PATH = {asked}: too large for {tier.name}; {largest} is used",)


def _largest_that_leaves_room(models: tuple[str, ...], vram_gb: float) -> str:
    needed = RENDERER_GB if vram_gb >= OFFLOAD_BELOW_GB else OFFLOADED_RENDERER_GB
    room = vram_gb - RESERVE_GB - needed
    return next((model for model in reversed(models) if _memory(model, vram_gb) <= room), models[0])


def _memory(model: str, vram_gb: float) -> float:
    name = model.rstrip("/").rsplit("/", 1)[-1]
    base = LM_MEMORY_GB.get(name, max(LM_MEMORY_GB.values()))
    return base + max(0.0, vram_gb - 24) * SHARE_ABOVE_GB
