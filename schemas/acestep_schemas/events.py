# SPDX-License-Identifier: Apache-2.0
"""The events: CloudEvents 1.0 with one typed ``data`` per state, as a union discriminated by ``type``.

Type checkers narrow an event by ``state``: after ``if event.state == "completed"``, ``event.data.audios`` is known to
be there; after ``if event.terminal``, nothing but a terminal event is left. ``Completed`` and ``Unfinished`` are also
the manifest that lies beside the audio in S3.

Readers take what newer versions write: ``parse_event`` and ``parse_manifest`` ignore unknown fields, and keep unknown
words, such as an error code, as text.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self
from uuid import UUID, uuid5

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from acestep_schemas.request import GenerationRequest

CONTENT_TYPE = "application/cloudevents+json"
MAX_PEAKS = 400
"""Bytes of a song's waveform in ``Audio.peaks``."""
_NAMESPACE = UUID("6f0f7f6c-0f5b-5a0e-9a0e-3c1f1f0a7d15")


class JobState(StrEnum):
    """The states that a job's events announce."""

    STARTED = "started"
    PROGRESS = "progress"
    COMPLETED = "completed"
    FAILED = "failed"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        """Whether no event follows this one."""
        return self not in (JobState.STARTED, JobState.PROGRESS)


class ErrorCode(StrEnum):
    """Machine-readable reason in ``failed``, ``rejected``, ``cancelled`` and ``expired`` events.

    A code of a newer version is read as a member of its own, which no other one equals.
    """

    MESSAGE_TOO_LARGE = "message_too_large"
    MALFORMED_BODY = "malformed_body"
    INVALID_REQUEST = "invalid_request"
    LIMIT_EXCEEDED = "limit_exceeded"
    TASK_UNSUPPORTED = "task_unsupported"
    MODEL_UNAVAILABLE = "model_unavailable"
    LM_UNAVAILABLE = "lm_unavailable"
    PLAN_FAILED = "plan_failed"
    INPUT_NOT_ALLOWED = "input_not_allowed"
    INPUT_UNREADABLE = "input_unreadable"
    RENDER_FAILED = "render_failed"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    EXECUTION_TIMEOUT = "execution_timeout"
    ENGINE_CRASHED = "engine_crashed"
    STORAGE_UNAVAILABLE = "storage_unavailable"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    INTERNAL = "internal_error"

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        unknown = str.__new__(cls, value)
        unknown._name_ = value.upper()
        unknown._value_ = value
        return unknown


def _word(value: object, known: ValidatorFunctionWrapHandler) -> object:
    """Return one of the known words, or another word of a newer version as it is."""
    try:
        return known(value)
    except ValidationError:
        if isinstance(value, str):
            return value
        raise


def _request(value: object, known: ValidatorFunctionWrapHandler) -> object:
    """Return a request; of one of a newer version, values that are invalid here are kept as they are."""
    try:
        return known(value)
    except ValidationError as error:
        if not isinstance(value, Mapping):
            raise
        unknown = {name: value[name] for problem in error.errors() if (name := problem["loc"][0]) in value}
        valid = known({name: each for name, each in value.items() if name not in unknown})
        return valid.model_copy(update={str(name): each for name, each in unknown.items()})


class Frozen(BaseModel):
    """Base of everything here: immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Adjustment(Frozen):
    """One value of the request that was changed, and why."""

    field: str
    requested: JsonValue
    applied: JsonValue
    reason: str


class Edit(Frozen):
    """A field that follows from an edit, or from a song that the request names: its value, and why it has it."""

    field: str
    value: JsonValue
    because: str


class ParentSong(Frozen):
    """A song that this one comes from: its task, its place among the task's songs, and the field that named it."""

    task_id: str
    index: int
    field: str


class LimitsReport(Frozen):
    """The limits of the GPU's tier that applied to this request."""

    max_duration_s: int
    max_batch_size: int


class PolicyReport(Frozen):
    """The GPU tier that applied to this request, and the values that its limits changed."""

    tier: str
    vram_gb: float
    lm_loaded: bool
    table_version: str
    limits: LimitsReport
    adjustments: tuple[Adjustment, ...] = ()


class ModelChoice(Frozen):
    """The DiT model that was requested, and the one that is used."""

    requested: str | None
    used: str
    fallback: bool


class LmChoice(Frozen):
    """The language model that wrote the plan of this job."""

    model: str
    backend: Annotated[Literal["vllm", "pt"], WrapValidator(_word)]


class FileObject(Frozen):
    """A file in S3 that belongs to a song; ``bytes`` and ``sha256`` are those of the object."""

    uri: str
    url: str | None = None
    content_type: str
    bytes: int
    sha256: str


class SongFiles(Frozen):
    """The files beside a song; None where there is none.

    ``lrc`` and ``vtt`` are its lyrics with times; ``latents`` its final latents, float16, [frames, channels].
    """

    lrc: FileObject | None = None
    vtt: FileObject | None = None
    latents: FileObject | None = None


class LyricToken(Frozen):
    """A syllable, word or character of a line, as the model reads it, and when it is sung, in seconds."""

    text: str
    start_s: float
    end_s: float


class LyricLine(Frozen):
    """A line of lyrics, or a section tag such as ``[Chorus]``, and when it is sung, in seconds of the song."""

    text: str
    start_s: float
    end_s: float
    tokens: tuple[LyricToken, ...] = ()


class Loudness(Frozen):
    """Integrated loudness in LUFS, None for silence, and true peak in dB of full scale, before it was encoded."""

    lufs: float | None
    true_peak_db: float


class Audio(Frozen):
    """One song in S3. ``duration_s`` is its length in seconds; ``bytes`` and ``sha256`` are those of the object.

    ``files`` are what lies beside it; None: nothing. ``lyrics`` are its lines with times, where the request asked for
    ``timestamps``; ``lyric_score`` says how well they are sung, 0 to 1, None where that was not measured.
    ``loudness`` is what was reached, where the request asked for ``loudness_lufs``; ``track`` the track that it is of:
    one that was extracted, or a repaint or variation of such a one; None: a whole song. ``peaks`` is its waveform in
    small: Base64 of at most 400 bytes, each the largest absolute sample of an equal slice, 255 being full scale; None:
    a worker of an earlier version.
    """

    uri: str
    url: str | None = None
    format: str
    content_type: str
    sample_rate: int
    channels: int
    duration_s: float
    bytes: int
    sha256: str
    seed: int
    files: SongFiles | None = None
    lyrics: tuple[LyricLine, ...] = ()
    lyric_score: float | None = None
    loudness: Loudness | None = None
    track: str | None = None
    peaks: Annotated[str, Field(max_length=536)] | None = None

    @property
    def lyric_files(self) -> dict[str, FileObject]:
        """The files beside it that have its lyrics with times, by their kind: ``lrc``, ``vtt``."""
        files = self.files or SongFiles()
        return {kind: file for kind, file in (("lrc", files.lrc), ("vtt", files.vtt)) if file is not None}


class Metas(Frozen):
    """The musical metadata that the song was made with.

    ``genres``, ``cot_caption`` and ``cot_lyrics`` are the language model's own words, whether the song was made with
    them or not; empty where it wrote none.
    """

    bpm: int | None = None
    duration: float | None = None
    keyscale: str = ""
    timesignature: str = ""
    language: str = ""
    caption: str = ""
    lyrics: str = ""
    genres: str = ""
    cot_caption: str = ""
    cot_lyrics: str = ""


class Timings(Frozen):
    """Seconds per stage; None where a stage did not run or could not be measured."""

    queued: float | None = None
    plan: float | None = None
    render: float | None = None
    encode: float | None = None
    upload: float | None = None
    total: float | None = None


class Candidate(Frozen):
    """One of several songs that the best were chosen from, kept or not.

    ``score`` is 0 (worst) to 1; None: it could not be decoded. ``index`` is its place in ``audios``, best first; None:
    it was not kept. ``measures`` are what the score was made from, by name; the units are in the documentation.
    """

    seed: int
    score: float | None
    kept: bool
    index: int | None = None
    measures: dict[str, float] = Field(default_factory=dict)


class ErrorReport(Frozen):
    """Error of a job without songs. ``details`` lists fields and the rules that they break, where there are any."""

    code: ErrorCode
    message: str
    retryable: bool
    attempts: int
    details: tuple[dict[str, JsonValue], ...] = ()


class Started(Frozen):
    """Data of ``started``: a worker has begun the job, and the limits of its tier have been applied.

    ``expected_s`` is how many seconds similar jobs took on this worker; None before there was one. ``request`` is the
    effective request, as in ``completed``, without audio codes; None: it is larger than 128 KiB, or the worker is of an
    earlier version.
    """

    task_id: str
    attempt: int
    worker_id: str
    model: ModelChoice
    lm: LmChoice | None
    policy: PolicyReport
    expected_s: float | None = None
    request: Annotated[GenerationRequest, WrapValidator(_request)] | None = None


class Progress(Frozen):
    """Data of ``progress``: ``progress`` is 0 to 1 and never falls; ``sequence`` counts from 1 within an attempt.

    ``remaining_s`` is an estimate of the seconds that are left; None where there is none.
    """

    task_id: str
    progress: Annotated[float, Field(ge=0, le=1)]
    stage: str
    sequence: int
    remaining_s: float | None = None


class Completed(Frozen):
    """Data of ``completed``, and the manifest in S3.

    ``audio_codes`` are the numbers of the codes that each song was made from, 5 a second; empty where the language
    model wrote none. With them, the seeds and the metadata a song can be made again without the language model. After
    ``extract_codes_only`` they are those of the source audio, and there are no songs.
    ``candidates`` are all songs that were made where the request asked for the best of several, in the order of the
    seeds; ``score_table`` is the version of the weights that they were scored by, None where nothing was.
    ``parents`` are the songs of earlier tasks that these come from; ``edits`` the fields that were taken from them, or
    that an edit stands for.
    ``state`` is the event's; on the wire, ``status`` says the same as ``succeeded``.
    """

    state: ClassVar[Literal["completed"]] = "completed"

    task_id: str
    status: Literal["succeeded"] = "succeeded"
    attempt: int
    worker_id: str
    finished_at: datetime
    model: ModelChoice
    lm: LmChoice | None
    policy: PolicyReport
    audios: tuple[Audio, ...]
    request: Annotated[GenerationRequest, WrapValidator(_request)]
    metas: Metas
    audio_codes: tuple[tuple[int, ...], ...] = ()
    candidates: tuple[Candidate, ...] = ()
    score_table: str | None = None
    timings: Timings
    warnings: tuple[str, ...] = ()
    parents: tuple[ParentSong, ...] = ()
    edits: tuple[Edit, ...] = ()


class Unfinished(Frozen):
    """Data of ``failed``, ``rejected``, ``cancelled`` and ``expired``, and their manifest in S3."""

    task_id: str
    status: Literal["failed", "rejected", "cancelled", "expired"]
    attempt: int
    worker_id: str
    finished_at: datetime
    error: ErrorReport
    policy: PolicyReport | None = None
    warnings: tuple[str, ...] = ()

    @property
    def state(self) -> Literal["failed", "rejected", "cancelled", "expired"]:
        """The event's state."""
        return self.status


class StageJobs(Frozen):
    """Running jobs of a worker, by the stage that they are in; those that wait in it included."""

    fetch: int = 0
    plan: int = 0
    render: int = 0
    encode: int = 0
    upload: int = 0


class StageLimitsReport(Frozen):
    """About how many jobs each stage of a worker takes at once; null: any number, or not known yet."""

    fetch: int | None = None
    plan: int | None = None
    render: int | None = None
    encode: int | None = None
    upload: int | None = None


class Worker(Frozen):
    """Data of a worker's own events.

    ``in_hand`` counts its running jobs, ``prefetch`` is how many it runs at once at most, ``seconds_per_job`` is how
    long its latest jobs took; None before the first. ``remaining_s`` estimates how long each running job still takes,
    null where that is unknown; it leaves out those that have not begun. ``stages`` counts the running jobs by stage;
    ``stage_limits`` says how many each stage takes. None: a worker of an earlier version. ``lm`` is the language model
    that is loaded; None: none is, or a worker of an earlier version.
    """

    worker_id: str
    state: Literal["ready", "draining", "stopped"]
    prefetch: int
    models: tuple[str, ...]
    tier: str
    vram_gb: float
    in_hand: int = 0
    seconds_per_job: float | None = None
    remaining_s: tuple[float | None, ...] | None = None
    stages: StageJobs | None = None
    stage_limits: StageLimitsReport | None = None
    lm: LmChoice | None = None


class CloudEvent(Frozen):
    """The envelope, CloudEvents 1.0 in JSON structured mode. Subclasses fix ``type`` and ``data``.

    ``traceparent`` is the extension for distributed tracing (W3C Trace Context); left out where there is no trace.
    """

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    subject: str
    time: datetime
    datacontenttype: Literal["application/json"] = "application/json"
    traceparent: str | None = None
    _data_json: bytes | None = PrivateAttr(default=None)

    def to_json(self) -> bytes:
        """Return the message body."""
        # An attribute without a value is left out: CloudEvents knows no null.
        excluded = {"traceparent"} if self.traceparent is None else set()
        if self._data_json is None:
            return self.model_dump_json(exclude=excluded, warnings=False).encode()
        envelope = self.model_dump_json(exclude={*excluded, "data"}).encode()
        return envelope[:-1] + b',"data":' + self._data_json + b"}"

    def with_data_json(self, data: bytes) -> Self:
        """Return the event with this JSON as its ``data``, byte for byte: it may hold more than this version knows."""
        event = self.model_copy()
        event._data_json = data  # noqa: SLF001 - its own class
        return event


class _JobEvent(CloudEvent):
    """``state`` is the job state that the event announces; ``terminal``: no other event of the job follows."""

    state: ClassVar[str]
    terminal: ClassVar[bool]

    @property
    def routing_key(self) -> str:
        """``job.<state>.<task_id>``."""
        return f"job.{self.state}.{self.subject}"


class JobStarted(_JobEvent):
    """``job.started``: a worker has begun the job."""

    state: ClassVar[Literal["started"]] = "started"
    terminal: ClassVar[Literal[False]] = False

    type: Literal["acestep.job.started.v1"] = "acestep.job.started.v1"
    data: Started

    @classmethod
    def of(cls, data: Started) -> Self:
        """Wrap ``data``; another attempt is another event."""
        return cls(**_envelope(data.task_id, f"started/{data.attempt}", data.worker_id, _now()), data=data)


class JobProgress(_JobEvent):
    """``job.progress``: may be lost, and never comes after the terminal event."""

    state: ClassVar[Literal["progress"]] = "progress"
    terminal: ClassVar[Literal[False]] = False

    type: Literal["acestep.job.progress.v1"] = "acestep.job.progress.v1"
    data: Progress

    @classmethod
    def of(cls, data: Progress, *, attempt: int, worker_id: str) -> Self:
        """Wrap ``data``."""
        return cls(**_envelope(data.task_id, f"progress/{attempt}/{data.sequence}", worker_id, _now()), data=data)


class JobCompleted(_JobEvent):
    """``job.completed``: the songs are in S3."""

    state: ClassVar[Literal["completed"]] = "completed"
    terminal: ClassVar[Literal[True]] = True

    type: Literal["acestep.job.completed.v1"] = "acestep.job.completed.v1"
    data: Completed

    @classmethod
    def of(cls, data: Completed) -> Self:
        """Wrap ``data``. The same manifest gives the same event, byte for byte, whoever publishes it."""
        return cls(**_envelope(data.task_id, data.status, data.worker_id, data.finished_at), data=data)


class JobFailed(_JobEvent):
    """``job.failed``: the job was started and could not be finished."""

    state: ClassVar[Literal["failed"]] = "failed"
    terminal: ClassVar[Literal[True]] = True

    type: Literal["acestep.job.failed.v1"] = "acestep.job.failed.v1"
    data: Unfinished


class JobRejected(_JobEvent):
    """``job.rejected``: the job was not started, because the request is at fault."""

    state: ClassVar[Literal["rejected"]] = "rejected"
    terminal: ClassVar[Literal[True]] = True

    type: Literal["acestep.job.rejected.v1"] = "acestep.job.rejected.v1"
    data: Unfinished


class JobCancelled(_JobEvent):
    """``job.cancelled``: somebody asked for the job to stop."""

    state: ClassVar[Literal["cancelled"]] = "cancelled"
    terminal: ClassVar[Literal[True]] = True

    type: Literal["acestep.job.cancelled.v1"] = "acestep.job.cancelled.v1"
    data: Unfinished


class JobExpired(_JobEvent):
    """``job.expired``: the request waited longer than its deadline allows."""

    state: ClassVar[Literal["expired"]] = "expired"
    terminal: ClassVar[Literal[True]] = True

    type: Literal["acestep.job.expired.v1"] = "acestep.job.expired.v1"
    data: Unfinished


class WorkerEvent(CloudEvent):
    """``worker.<state>``: a worker is ready, drains (takes no new jobs) or has stopped."""

    terminal: ClassVar[Literal[False]] = False

    type: Literal["acestep.worker.ready.v1", "acestep.worker.draining.v1", "acestep.worker.stopped.v1"]
    data: Worker

    @property
    def state(self) -> Literal["ready", "draining", "stopped"]:
        """The worker's state."""
        return self.data.state

    @property
    def routing_key(self) -> str:
        """``worker.<state>.<worker_id>``."""
        return f"worker.{self.data.state}.{self.data.worker_id}"

    @classmethod
    def of(cls, data: Worker) -> Self:
        """Wrap ``data``; each announcement is an event of its own."""
        now = _now()
        envelope = _envelope(data.worker_id, f"{data.state}/{now.isoformat()}", data.worker_id, now)
        return cls(**envelope, type=f"acestep.worker.{data.state}.v1", data=data)


type_of_unfinished: dict[str, type[JobFailed | JobRejected | JobCancelled | JobExpired]] = {
    "failed": JobFailed,
    "rejected": JobRejected,
    "cancelled": JobCancelled,
    "expired": JobExpired,
}

JobEvent = JobStarted | JobProgress | JobCompleted | JobFailed | JobRejected | JobCancelled | JobExpired
TerminalEvent = JobCompleted | JobFailed | JobRejected | JobCancelled | JobExpired
Event = Annotated[JobEvent | WorkerEvent, Field(discriminator="type")]
Manifest = Annotated[Completed | Unfinished, Field(discriminator="status")]
_EVENT: TypeAdapter[JobEvent | WorkerEvent] = TypeAdapter(Event)
_MANIFEST: TypeAdapter[Completed | Unfinished] = TypeAdapter(Manifest)


def unfinished_event(data: Unfinished) -> TerminalEvent:
    """Wrap the data of a job that ended without songs in the event of its status."""
    envelope = _envelope(data.task_id, data.status, data.worker_id, data.finished_at)
    return type_of_unfinished[data.status](**envelope, data=data)


def parse_event(body: bytes) -> JobEvent | WorkerEvent:
    """Parse one event, of this version or another. Raises pydantic's ``ValidationError`` for anything else."""
    return _EVENT.validate_json(body, extra="ignore")


def parse_manifest(body: bytes) -> Completed | Unfinished:
    """Parse ``manifest.json``, of this version or another. Raises pydantic's ``ValidationError`` for anything else."""
    return _MANIFEST.validate_json(body, extra="ignore")


def _envelope(subject: str, what: str, worker_id: str, time: datetime) -> dict[str, Any]:
    """Return the envelope's fields. The id is derived from subject and ``what``, so that repeats are recognised."""
    return {
        "id": str(uuid5(_NAMESPACE, f"{subject}/{what}")),
        "source": f"/acestep-consumer/{worker_id}",
        "subject": subject,
        "time": time,
    }


def _now() -> datetime:
    return datetime.now(UTC)
