# SPDX-License-Identifier: Apache-2.0
"""What crosses the pipe between the consumer process and an engine process: small, frozen, JSON.

Audio never does: it crosses as files in the job's scratch folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import Job, LoadedModel, Plan, Rendering, Sources, TokenizedSource
from acestep_schemas.events import ErrorCode


@dataclass(frozen=True, slots=True, kw_only=True)
class RendererReport:
    """What the renderer found and loaded. ``vram_gb`` is 0 without a GPU; ``models`` starts with the primary.

    ``attention`` names the kernels that attend, ``compiled`` says whether the DiT and the decoder are compiled.
    """

    device: str
    device_name: str
    vram_gb: float
    models: tuple[LoadedModel, ...]
    formats: tuple[str, ...]
    offload: bool = False
    attention: str = ""
    compiled: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerReport:
    """What the planner loaded. ``backend`` is the one that runs, whatever was asked for."""

    model: str
    backend: Literal["vllm", "pt"]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Configure:
    """Parent to child, first: load what these settings name.

    ``memory_gb``: the renderer's share of the device, if that is agreed already.
    """

    kind: Literal["configure"] = "configure"
    settings: EngineSettings
    memory_gb: float | None = None
    max_input_s: float = 600
    log_level: str = "info"
    log_json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigurePlanner:
    """Parent to child, first: load this language model. ``backend`` None: vLLM where installed, else transformers.

    ``memory_gb`` bounds weights and key-value cache together; ``offload`` keeps the idle model in RAM.
    """

    kind: Literal["configure-planner"] = "configure-planner"
    model: str
    backend: Literal["vllm", "pt"] | None = None
    memory_gb: float
    device: str = "auto"
    checkpoint_dir: Path | None = None
    offload: bool = False
    log_level: str = "info"
    log_json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSongs:
    """Parent to planner: write what the job leaves open. ``heard`` are the source audio's codes, for analysis."""

    kind: Literal["think"] = "think"
    order: int
    job: Job
    heard: TokenizedSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeAudio:
    """Parent to renderer: turn the source audio into audio codes."""

    kind: Literal["listen"] = "listen"
    order: int
    job: Job
    sources: Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Render:
    """Parent to child: make this job's songs. ``order`` numbers the request on this pipe."""

    kind: Literal["render"] = "render"
    order: int
    job: Job
    plan: Plan
    sources: Sources
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Parent to child: nobody waits for this order any more."""

    kind: Literal["stop"] = "stop"
    order: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetMemoryShare:
    """Parent to renderer: use so many GiB of the device from now on; the rest is the language model's."""

    kind: Literal["allot"] = "allot"
    memory_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Child to parent: still starting; ``what`` is for the log."""

    kind: Literal["loading"] = "loading"
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Child to parent: orders are welcome."""

    kind: Literal["ready"] = "ready"
    report: RendererReport | PlannerReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """Child to parent: it cannot start, and trying again would not help; ``reason`` says what to do."""

    kind: Literal["unusable"] = "unusable"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """Child to parent: this order's ``stage`` is done to ``fraction``, 0 to 1."""

    kind: Literal["progressed"] = "progressed"
    order: int
    fraction: float
    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Child to parent: this order's result. Songs lie in the job's folder."""

    kind: Literal["done"] = "done"
    order: int
    result: Rendering | Plan | TokenizedSource


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed:
    """Child to parent: this order alone came to nothing. ``reason`` is public text."""

    kind: Literal["broken"] = "broken"
    order: int
    code: ErrorCode
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchFull:
    """Child to parent: the disk has no room for this order's files. Nothing is wrong with the order."""

    kind: Literal["no-room"] = "no-room"
    order: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Child to parent, about once a second while it works: how the device is used.

    Times in seconds, counts and times since the process was ready; memory in GiB.

    Attributes:
        ready_s: since it became ready.
        busy_s: of these, with work on the device.
        songs_done: songs finished.
        audio_s: seconds of audio finished.
        in_hand: orders accepted and not answered yet.
        songs_in_pack: songs of the last denoising step.
        tokens_in_pack: their tokens.
        memory_gb: in use on the device; 0 without a GPU.
        memory_limit_gb: the renderer's share of it; 0 when no limit is known.
        squeezes: times that memory made a pack smaller, or work wait.
    """

    kind: Literal["vitals"] = "vitals"
    ready_s: float
    busy_s: float
    songs_done: int
    audio_s: float
    in_hand: int
    songs_in_pack: int
    tokens_in_pack: int
    memory_gb: float
    memory_limit_gb: float
    squeezes: int


ToEngine = Configure | ConfigurePlanner | SetMemoryShare | Render | PlanSongs | TokenizeAudio | Stop
FromEngine = Loading | Ready | Unusable | Progressed | Done | RequestFailed | ScratchFull | EngineStats

TO_ENGINE: TypeAdapter[ToEngine] = TypeAdapter(Annotated[ToEngine, Field(discriminator="kind")])
FROM_ENGINE: TypeAdapter[FromEngine] = TypeAdapter(Annotated[FromEngine, Field(discriminator="kind")])
