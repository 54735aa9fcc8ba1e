# SPDX-License-Identifier: Apache-2.0
"""What ``plan`` answers, as frozen parts; ``--json`` prints them as they are."""

from pydantic import BaseModel, ConfigDict

from acestep_consumer.policy.sizing import Bound


class _PlanPart(BaseModel):
    model_config = ConfigDict(frozen=True)


class CardPart(_PlanPart):
    """The card. Speeds are relative to the one that was measured; None: unknown, reckoned as the measured one."""

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
    """What waits in RAM between uses, and why."""

    models: bool
    dit: bool
    because: str


class ModelPart(_PlanPart):
    """A DiT model that the settings name."""

    name: str
    size: str


class LmPart(_PlanPart):
    """The language model. ``memory_gb`` counts in 10⁹ bytes, as the settings do."""

    model: str
    backend: str
    backend_is_set: bool
    memory_gb: float
    weights_gib: float
    songs_at_once: int


class FitPart(_PlanPart):
    """A pair of models: GiB left beside one song of 300 s, negative when it does not fit."""

    dit: str
    lm: str | None
    fits: bool
    left_gib: float


class MemoryPart(_PlanPart):
    """How the card is shared, GiB."""

    card_gib: float
    reserve_gib: float
    lm_gib: float
    lm_song_gib: float
    renderer_gib: float
    renderer_weights_gib: float
    renderer_working_gib: float
    renderer_song_gib: float


class WorkloadPart(_PlanPart):
    """What each message asks for, after the tier's clamps."""

    model: str
    duration_s: float
    batch: int
    thinking: bool
    steps: int
    guided: bool
    audio_format: str


class WorkersPart(_PlanPart):
    """The recommended number of workers: where their jobs are, and why it is no more."""

    recommended: int
    set_now: int | None
    in_lm: int
    in_renderer: int
    elsewhere: int
    bound_by: Bound | None
    because: str


class ExpectedSongsPart(_PlanPart):
    """Expected songs a minute at best, None when unknown, and what takes the time: seconds of the card for a song."""

    a_minute: float | None
    lm_s: float
    renderer_s: float
    encoding_cores: float
    rests_on: str


class PlanReport(_PlanPart):
    """The whole answer; ``--json`` prints it."""

    card: CardPart
    tier: TierLimitsPart
    offload: OffloadPart
    models: tuple[ModelPart, ...]
    lm: LmPart | None
    possible: tuple[FitPart, ...]
    fits: bool
    memory: MemoryPart | None
    workload: WorkloadPart
    workers: WorkersPart
    songs: ExpectedSongsPart
    notes: tuple[str, ...]
