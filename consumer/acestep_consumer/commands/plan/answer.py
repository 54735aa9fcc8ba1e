# SPDX-License-Identifier: Apache-2.0
"""The report of ``plan``, as frozen parts; ``--json`` prints it unchanged."""

from pydantic import BaseModel, ConfigDict

from acestep_consumer.policy.sizing import Bound


class _PlanPart(BaseModel):
    model_config = ConfigDict(frozen=True)


class GpuPart(_PlanPart):
    """The GPU. Speeds are relative to the measured one; None: unknown, calculated as if it were that one."""

    name: str
    vram_gb: float
    found_by: str
    compute: float | None
    bandwidth: float | None


class TierLimitsPart(_PlanPart):
    """The tier's limits, with the LM and without."""

    name: str
    table_version: str
    max_duration_s_with_lm: int
    max_duration_s: int
    max_batch_with_lm: int
    max_batch: int


class OffloadPart(_PlanPart):
    """Whether idle models and the DiT are kept in RAM, and why."""

    models: bool
    dit: bool
    because: str


class ModelPart(_PlanPart):
    """A configured DiT model."""

    name: str
    size: str


class LmPart(_PlanPart):
    """The language model. ``memory_gb``: in 10⁹ bytes; ``songs_at_once``: what memory and batch have room for."""

    model: str
    backend: str
    backend_is_set: bool
    memory_gb: float
    memory_gib: float
    weights_gib: float
    songs_at_once: int


class FitPart(_PlanPart):
    """A pair of models, the GiB left beside one song of 300 s (negative: it does not fit), and songs per minute."""

    dit: str
    lm: str | None
    backend: str | None
    fits: bool
    left_gib: float
    songs_a_minute: float | None


class MemoryPart(_PlanPart):
    """Split of the GPU's memory, GiB. ``renderer_graphs_gib``: of the renderer's weights, the inputs of CUDA graphs."""

    card_gib: float
    reserve_gib: float
    lm_gib: float
    lm_song_gib: float
    renderer_gib: float
    renderer_weights_gib: float
    renderer_graphs_gib: float
    renderer_working_gib: float
    renderer_song_gib: float


class WorkloadPart(_PlanPart):
    """A request of the workload, within the tier's limits."""

    model: str
    duration_s: float
    batch: int
    thinking: bool
    steps: int
    guided: bool
    audio_format: str


class WorkersPart(_PlanPart):
    """The recommended number of concurrent jobs, the stages they are in, and what limits it."""

    recommended: int
    set_now: int | None
    in_lm: int
    in_renderer: int
    elsewhere: int
    bound_by: Bound | None
    because: str


class ExpectedSongsPart(_PlanPart):
    """Expected songs per minute at best, None if unknown; seconds of GPU time per song; the basis of the estimate."""

    a_minute: float | None
    lm_s: float
    renderer_s: float
    encoding_cores: float
    rests_on: str


class PlanReport(_PlanPart):
    """The whole report. ``possible_int8``: the same pairs with weights in int8, on small GPUs where they are not."""

    card: GpuPart
    tier: TierLimitsPart
    other_tiers: tuple[TierLimitsPart, ...]
    offload: OffloadPart
    models: tuple[ModelPart, ...]
    lm: LmPart | None
    quantization: str | None
    possible: tuple[FitPart, ...]
    possible_int8: tuple[FitPart, ...]
    fits: bool
    memory: MemoryPart | None
    workload: WorkloadPart
    workers: WorkersPart
    songs: ExpectedSongsPart
    notes: tuple[str, ...]
