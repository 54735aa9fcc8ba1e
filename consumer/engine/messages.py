# SPDX-License-Identifier: Apache-2.0
"""What crosses the pipe between the consumer process and an engine process: small, frozen, JSON.

Audio never does: it crosses as files in the job's scratch folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from consumer.job import Heard, Job, LoadedModel, Plan, Rendering, Sources
from consumer.settings import EngineSettings
from schemas.events import ErrorCode


@dataclass(frozen=True, slots=True, kw_only=True)
class RendererReport:
    """What the renderer found and loaded. ``vram_gb`` is 0 without a GPU; ``models`` starts with the primary."""

    device: str
    device_name: str
    vram_gb: float
    models: tuple[LoadedModel, ...]
    formats: tuple[str, ...]
    lanes: int
    offload: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerReport:
    """What the planner loaded. ``backend`` is the one that runs, whatever was asked for."""

    model: str
    backend: Literal["vllm", "pt"]
    planner_device: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Configure:
    """Parent to child, first: load what these settings name."""

    kind: Literal["configure"] = "configure"
    settings: EngineSettings
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
class Think:
    """Parent to planner: write what the job leaves open. ``heard`` are the source audio's codes, for analysis."""

    kind: Literal["think"] = "think"
    order: int
    job: Job
    heard: Heard | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
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
    result: Rendering | Plan | Heard


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """Child to parent: this order alone came to nothing. ``reason`` is public text."""

    kind: Literal["broken"] = "broken"
    order: int
    code: ErrorCode
    reason: str


ToEngine = Configure | ConfigurePlanner | Render | Think | Listen | Stop
FromEngine = Loading | Ready | Unusable | Progressed | Done | Broken

TO_ENGINE: TypeAdapter[ToEngine] = TypeAdapter(Annotated[ToEngine, Field(discriminator="kind")])
FROM_ENGINE: TypeAdapter[FromEngine] = TypeAdapter(Annotated[FromEngine, Field(discriminator="kind")])
