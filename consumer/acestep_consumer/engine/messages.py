# SPDX-License-Identifier: Apache-2.0
"""Messages on the pipe between the consumer process and an engine process: small, frozen, sent as JSON.

Audio is not sent: it crosses as files in the job's scratch folder. Both processes are of one version, so that the
messages may change freely.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter

from acestep_consumer.config.settings import EngineSettings, LogLevel, Quantization
from acestep_consumer.domain.errors import ConsumerError, InvalidRequest
from acestep_consumer.domain.job import Job, LoadedModel, Plan, Rendering, Sources, TokenizedSource
from acestep_schemas.events import ErrorCode
from acestep_schemas.request import FieldProblem

StartPhase = Literal["imports", "waiting", "models", "warm-up"]
"""Parts of an engine's start. ``waiting``: for the other engine to find the device, or to measure its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RendererReport:
    """The renderer's device, models and formats, known once it is ready.

    Attributes:
        device: as torch names it, such as ``cuda:0``.
        device_name: the product's name.
        vram_gb: memory of the device in GiB; 0 without a GPU.
        models: the loaded models, the primary first.
        formats: audio formats that can be encoded.
        offload: whether models wait in RAM between uses.
        attention: the attention kernel in use.
        encoders: songs that are encoded at once; 0: one for each request.
        compiled: whether the DiT and the VAE decoder are compiled.
        warnings: notes for the operator.
    """

    device: str
    device_name: str
    vram_gb: float
    models: tuple[LoadedModel, ...]
    formats: tuple[str, ...]
    offload: bool = False
    attention: str = ""
    encoders: int = 0
    compiled: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerReport:
    """The planner's model and backend; ``backend`` is the one that runs, whatever was asked for.

    ``songs``: the most that it writes at once; its memory may hold fewer, as it reports by ``LmStats``. None: only its
    memory decides.
    """

    model: str
    backend: Literal["vllm", "pt"]
    songs: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Configure:
    """Parent to renderer, first: load the models that these settings name.

    ``memory_gb``: the renderer's share of the device in GiB, if that is decided already. ``max_input_s``: longest
    accepted audio input.
    """

    kind: Literal["configure"] = "configure"
    settings: EngineSettings
    memory_gb: float | None = None
    max_input_s: float = 600
    log_level: LogLevel = "info"
    log_json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigurePlanner:
    """Parent to planner, first: load this language model. ``backend`` None: vLLM where installed, else transformers.

    ``memory_gb`` bounds weights and key-value cache together; ``offload`` keeps the idle model in RAM. ``wait``: load
    nothing before ``LoadModels``, only import what loading needs. ``beside``: the renderer may be loading at the same
    time, so that the memory of the device as a whole says nothing. ``compile_cache``: folder for compiled kernels.
    """

    kind: Literal["configure-planner"] = "configure-planner"
    model: str
    backend: Literal["vllm", "pt"] | None = None
    memory_gb: float
    device: str = "auto"
    checkpoint_dir: Path | None = None
    offload: bool = False
    quantization: Quantization | None = None
    wait: bool = False
    beside: bool = False
    compile_cache: Path | None = None
    log_level: LogLevel = "info"
    log_json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadModels:
    """Parent to planner, after a ``ConfigurePlanner`` with ``wait``: load now, with these settings."""

    kind: Literal["load-models"] = "load-models"
    configure: ConfigurePlanner


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSongs:
    """Parent to planner: plan what the job leaves open. ``source`` is the tokenized source audio, for analysis."""

    kind: Literal["plan-songs"] = "plan-songs"
    request_id: int
    job: Job
    source: TokenizedSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeAudio:
    """Parent to renderer: turn the source audio into audio codes."""

    kind: Literal["tokenize-audio"] = "tokenize-audio"
    request_id: int
    job: Job
    sources: Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Render:
    """Parent to renderer: render this job's songs into ``folder``. ``request_id`` numbers the requests on this pipe."""

    kind: Literal["render"] = "render"
    request_id: int
    job: Job
    plan: Plan
    sources: Sources
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Parent to child: nobody waits for this request any more."""

    kind: Literal["stop"] = "stop"
    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetMemoryShare:
    """Parent to renderer: use at most so many GiB of the device from now on; the rest is the language model's."""

    kind: Literal["set-memory-share"] = "set-memory-share"
    memory_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLogLevel:
    """Parent to child: log from this level on."""

    kind: Literal["set-log-level"] = "set-log-level"
    log_level: LogLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Child to parent: still starting. ``step`` is for the log; ``phase`` is the part of the start it belongs to."""

    kind: Literal["loading"] = "loading"
    step: str
    phase: StartPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFound:
    """Child to parent, before the models are loaded: the renderer's device, so that the planner can start beside it.

    ``device`` as torch names it; ``vram_gb`` in GiB, 0 without a GPU.
    """

    kind: Literal["device-found"] = "device-found"
    device: str
    vram_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """Child to parent, every few seconds until it is ready: the process runs, whatever its main thread waits for."""

    kind: Literal["alive"] = "alive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Child to parent: the models are loaded, and requests are accepted."""

    kind: Literal["ready"] = "ready"
    report: RendererReport | PlannerReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """Child to parent: it cannot start, and a restart would not help; ``reason`` says what to change."""

    kind: Literal["unusable"] = "unusable"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """Child to parent: this request's ``stage`` is done to ``fraction``, 0 to 1."""

    kind: Literal["progressed"] = "progressed"
    request_id: int
    fraction: float
    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Child to parent: this request's result. Songs are in the job's folder."""

    kind: Literal["done"] = "done"
    request_id: int
    result: Rendering | Plan | TokenizedSource


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed:
    """Child to parent: this request failed, and no other did. ``reason`` is public text.

    ``problems`` are the fields at fault, where the request is invalid.
    """

    kind: Literal["request-failed"] = "request-failed"
    request_id: int
    code: ErrorCode
    reason: str
    problems: tuple[FieldProblem, ...] = ()

    @classmethod
    def of(cls, request_id: int, error: ConsumerError) -> Self:
        """Return the message for ``error``."""
        problems = error.problems if isinstance(error, InvalidRequest) else ()
        return cls(request_id=request_id, code=error.code, reason=str(error), problems=problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchFull:
    """Child to parent: the scratch disk is too full for this request's files. The request itself is fine."""

    kind: Literal["scratch-full"] = "scratch-full"
    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Child to parent, about once a second while it works: usage of the device.

    Times in seconds, counts and times since the process was ready; memory in GiB.

    Attributes:
        busy_s: with work on the device.
        songs_done: songs finished.
        audio_s: seconds of audio finished.
        pending: requests accepted and not answered yet.
        songs_in_pack: songs of the last denoising step.
        tokens_in_pack: tokens of the last denoising step.
        memory_gb: in use on the device; 0 without a GPU.
        memory_limit_gb: the renderer's share of it; 0 when no limit is known.
        reductions: times that a lack of memory made a batch smaller, or a job wait.
        pack_s: seconds of audio in one full batch, at the last step's tokens a second of audio; 0: not known yet.
    """

    kind: Literal["engine-stats"] = "engine-stats"
    busy_s: float
    songs_done: int
    audio_s: float
    pending: int
    songs_in_pack: int
    tokens_in_pack: int
    memory_gb: float
    memory_limit_gb: float
    reductions: int
    pack_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LmStats:
    """Child to parent, when it has changed: sequences in the language model's batch, and those that wait for memory."""

    kind: Literal["lm-stats"] = "lm-stats"
    running: int
    waiting: int


ToEngine = (
    Configure | ConfigurePlanner | LoadModels | SetMemoryShare | SetLogLevel | Render | PlanSongs | TokenizeAudio | Stop
)
FromEngine = (
    DeviceFound
    | Loading
    | Alive
    | Ready
    | Unusable
    | Progressed
    | Done
    | RequestFailed
    | ScratchFull
    | EngineStats
    | LmStats
)

TO_ENGINE: TypeAdapter[ToEngine] = TypeAdapter(Annotated[ToEngine, Field(discriminator="kind")])
FROM_ENGINE: TypeAdapter[FromEngine] = TypeAdapter(Annotated[FromEngine, Field(discriminator="kind")])
