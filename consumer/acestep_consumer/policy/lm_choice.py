# SPDX-License-Identifier: Apache-2.0
"""Chooses the 5Hz LM for a GPU, its backend and its share of the memory. Pure.

The worker, ``doctor`` and ``plan`` ask the same function with the same request (``engine.planner.registry``).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from acestep_consumer.policy.benchmarks import (
    DIT_2B,
    GIB,
    LM_SIZES,
    RESERVE_GB,
    Backend,
    LmSize,
    is_same_size,
    lm_size,
)
from acestep_consumer.policy.lm_memory import CONTEXT, ROWS, beside_weights
from acestep_consumer.policy.memory_budget import StepGraphLimits
from acestep_consumer.policy.sizing import GpuSpec, LmSpec, ModelSet, Workload, capacity, lm_on_gpu
from acestep_consumer.policy.tiers import LM_MEMORY_GB, LMS, OFFLOAD_BELOW_GB, Tier

SHARE_ABOVE_GB = 0.4
"""Of the memory beyond 24 GB, this share goes to the LM's key-value cache, for more concurrent sequences."""

RENDERER_GB, OFFLOADED_RENDERER_GB = 7.4, 4.5
"""The minimum for a renderer with a 2B model: its weights (offloaded: the DiT's only) and one song. GiB, as a GPU's
memory everywhere; an LM's memory is in 10⁹ bytes."""

INT8_FREES_GB = 1.4
"""So much less is the minimum where the DiT's weights are in int8."""

STARTING_RENDERER_GB = 20.0
"""More than a renderer takes at any time of its start, for each of its models: 10 GB of weights (XL), 5.8 of tiles."""

KEPT_THROUGHPUT = 0.5
"""A larger LM is the default only where it keeps this share of the songs per minute of the fastest one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LmRequest:
    """The operator's settings, and the LMs that can be had. None: decided by the GPU's tier.

    Attributes:
        init: True: required; False: none.
        model: a name, a folder or a hub id.
        backend: None: vLLM if installed, else transformers.
        on_disk: names of ACE-Step's LMs that are on the disk; None: not known, as for a GPU of another machine.
        on_hub: names of those that can be downloaded.
        sizes: of the models whose files are here, by the name or path in ``model`` and ``on_disk``.
        int8: whether the weights of LM and DiT are quantized.
    """

    init: bool | None = None
    model: str | None = None
    backend: Backend | None = None
    on_disk: frozenset[str] | None = None
    on_hub: frozenset[str] = frozenset()
    sizes: Mapping[str, LmSize] = field(default_factory=dict)
    int8: bool = False

    def size_of(self, model: str) -> LmSize:
        """Return the size of an LM: of its files, or else by its name."""
        return replace(self.sizes.get(model) or lm_size(model), int8=self.int8)


@dataclass(frozen=True, slots=True, kw_only=True)
class LmPlan:
    """The LM to load.

    Attributes:
        model: its name, folder or hub id.
        backend: None: vLLM if installed, else transformers.
        memory_gb: its whole budget, in 10⁹ bytes.
        size: of its files, or else by its name.
        required: whether a worker must not start without it.
        warnings: where it is not what the operator or the tier would have.
        trade_off: what the choice costs in quality or throughput, for the log; empty where there was none.
    """

    model: str
    backend: Backend | None
    memory_gb: float
    size: LmSize
    required: bool
    warnings: tuple[str, ...] = ()
    trade_off: str = ""

    def on_gpu(self, workload: Workload, vram_gb: float, models: int) -> LmSpec:
        """Return the LM as it would be loaded on a GPU beside so many models of the renderer."""
        wanted = LmSpec(
            model=self.model,
            backend="vllm",
            memory=int(self.memory_gb * 1e9),
            size=self.size,
            beside=loads_beside(self, vram_gb, models),
        )
        return lm_on_gpu(wanted, workload, backend=self.backend)


def plan_lm(wish: LmRequest, tier: Tier, vram_gb: float) -> LmPlan | None:
    """Choose the LM for a GPU, or none.

    The tier's largest LM is the upper bound. By default it is the largest one that leaves enough memory for the
    renderer and at least ``KEPT_THROUGHPUT``, of those on the disk; where none of these is on the disk, of those that
    can be downloaded.
    """
    wanted = tier.lm_by_default if wish.init is None else wish.init
    if not wanted:
        return None
    trade_off = ""
    if wish.model is None:
        rates = _rates(_that_leave_room(tier.lms or LMS[:1], wish, vram_gb), wish, vram_gb)
        model, warnings = _default(wish, rates, f"{tier.name} with {vram_gb:.3g} GB", on_gpu=vram_gb > 0)
        trade_off = _trade_off(model, rates)
    else:
        model, warnings = _named(wish, wish.model, tier)
    return LmPlan(
        model=model,
        backend=wish.backend,
        memory_gb=_memory(wish.size_of(model), vram_gb),
        size=wish.size_of(model),
        required=wish.init is True,
        warnings=warnings,
        trade_off=trade_off,
    )


def renderer_share(plan: LmPlan, vram_gb: float) -> float:
    """Return the GiB left for the renderer on the same GPU."""
    return max(vram_gb - _gib(plan.memory_gb) - RESERVE_GB, 0.0)


def loads_beside(plan: LmPlan, vram_gb: float, models: int) -> bool:
    """Whether the LM may load while the renderer does: whatever the latter takes for its trial runs, both fit.

    vLLM keeps back some of its memory then, and does not start where nothing is left for keys and values.
    """
    room = plan.memory_gb * 1e9 - plan.size.weights - beside_weights(ROWS, beside=True)
    fits = plan.backend == "pt" or room >= CONTEXT * plan.size.token_bytes
    return fits and renderer_share(plan, vram_gb) >= STARTING_RENDERER_GB * models


def _named(wish: LmRequest, asked: str, tier: Tier) -> tuple[str, tuple[str, ...]]:
    """Return the LM that the operator named, unless it is larger than the tier allows, whatever it is called."""
    largest = tier.lms[-1] if tier.lms else LMS[0]
    unknown = asked not in wish.sizes and asked.rstrip("/").rsplit("/", 1)[-1] not in LMS
    most = max(LM_SIZES[largest].parameters, wish.size_of(largest).parameters)
    if unknown or largest == LMS[-1] or _is_at_most(wish.size_of(asked), most):
        return asked, ()
    return largest, (f"ACESTEP_LM_MODEL_PATH = {asked}: too large for {tier.name}; {largest} is used",)


def _default(wish: LmRequest, rates: Mapping[str, float], gpu: str, *, on_gpu: bool) -> tuple[str, tuple[str, ...]]:
    """Return the LM for an operator who named none, and a warning where it is not the best one for the GPU.

    ``rates``: songs per minute by LM, of those that leave enough memory for the renderer, smallest LM first.
    """
    best = _best(rates)
    if wish.on_disk is None or best in wish.on_disk:
        return best, ()
    here = [model for model in LMS if model in wish.on_disk]
    usable = {model: rate for model, rate in rates.items() if model in here}
    if usable:
        used = _best(usable)
        return used, (f"{used} is used: {best} would suit this GPU better, but is not on the disk",)
    if here and not on_gpu:
        return here[0], ()  # on a CPU it takes RAM, of which the tiers say nothing
    unusable = f" ({', '.join(here)}: too large for {gpu})" if here else ""
    missing = f"no language model for this GPU is on the disk{unusable}"
    downloadable = {model: rate for model, rate in rates.items() if model in wish.on_hub}
    if downloadable:
        return _best(downloadable), (f"{missing}: {_best(downloadable)} is downloaded",)
    return best, (f"{missing}: put {' or '.join(rates)} into ACESTEP_CHECKPOINT_DIR",)


def _best(rates: Mapping[str, float]) -> str:
    """Return the largest LM that keeps enough throughput."""
    enough = KEPT_THROUGHPUT * max(rates.values())
    return [model for model, rate in rates.items() if rate >= enough][-1]


def _is_at_most(size: LmSize, parameters: int) -> bool:
    return size.parameters <= parameters or is_same_size(size.parameters, parameters)


def _rates(models: tuple[str, ...], wish: LmRequest, vram_gb: float) -> dict[str, float]:
    """Return the estimated songs of 300 s per minute with each LM, on a GPU of this memory as fast as the measured one.

    Only their ratios count. 0 where a song does not fit beside the LM, and without a GPU.
    """
    gpu, workload = GpuSpec(name="", vram_gb=vram_gb), Workload(audio_format="wav")
    offload = vram_gb < OFFLOAD_BELOW_GB
    graphs = None if offload else StepGraphLimits.on_a_device_with(vram_gb)
    dit = replace(DIT_2B, int8=wish.int8)
    found = {}
    for model in models:
        size = wish.size_of(model)
        plan = LmPlan(model=model, backend=wish.backend, memory_gb=_memory(size, vram_gb), size=size, required=False)
        lm = plan.on_gpu(workload, vram_gb, 1)
        load = ModelSet(models=(dit,), lm=lm, offload_models=offload, offload_dit=offload, graphs=graphs)
        found[model] = capacity(gpu, load, workload).songs_a_minute or 0.0
    return found


def _trade_off(chosen: str, rates: Mapping[str, float]) -> str:
    """Return how the LM compares with the larger ones that fit and with a faster one; empty if there is neither."""
    rate = rates.get(chosen, 0.0)
    if not rate:
        return ""
    fastest = max(rates, key=rates.__getitem__)
    larger = [model for model in rates if LMS.index(model) > LMS.index(chosen)]
    found = [f"{model} would make about {rates[model] / rate:.0%} of its songs a minute" for model in larger]
    if LMS.index(fastest) < LMS.index(chosen):
        found.append(f"{fastest} would make about {rates[fastest] / rate:.0%} of its songs a minute")
    return "; ".join((*found, "ACESTEP_LM_MODEL_PATH chooses another")) if found else ""


def _that_leave_room(models: tuple[str, ...], wish: LmRequest, vram_gb: float) -> tuple[str, ...]:
    """Return the LMs that leave enough memory for the renderer, smallest first; if none does, the smallest."""
    needed = RENDERER_GB if vram_gb >= OFFLOAD_BELOW_GB else OFFLOADED_RENDERER_GB
    room = vram_gb - RESERVE_GB - (needed - INT8_FREES_GB if wish.int8 else needed)
    return tuple(model for model in models if _gib(_memory(wish.size_of(model), vram_gb)) <= room) or models[:1]


def _gib(gigabytes: float) -> float:
    return gigabytes * 1e9 / GIB


def _memory(size: LmSize, vram_gb: float) -> float:
    """Return the GB of an LM: between the published sizes by its parameters, beyond the largest by its weights.

    In int8 it gets less by what its weights are smaller, so that it has room for as many songs.
    """
    known = [(LM_SIZES[name].weights / 1e9, memory) for name, memory in LM_MEMORY_GB.items()]
    weights = replace(size, int8=False).weights / 1e9
    base = known[0][1]
    for (low, least), (high, most) in itertools.pairwise(known):
        base += (most - least) * min(max((weights - low) / (high - low), 0.0), 1.0)
    base += max(0.0, weights - known[-1][0]) + max(0.0, vram_gb - 24) * SHARE_ABOVE_GB
    return base - (weights - size.weights / 1e9)
