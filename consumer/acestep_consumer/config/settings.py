# SPDX-License-Identifier: Apache-2.0
"""Settings: environment variables and ``.env``, read and validated once, passed on as frozen sections.

An unknown variable that starts with ``ACESTEP_`` is an error: a typo must not silently become a default. pydantic
validates; pydantic-settings is not used, since secret files, layers and unknown variables would all be custom sources.
"""

import difflib
import io
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    AmqpDsn,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
)

from acestep_consumer.config.amqp_urls import (
    ENCODING,
    has_raw_login,
    problem_of_parameters,
    split_urls,
    warnings_of,
)
from acestep_consumer.config.secret_files import SUFFIX, SecretFileError, layered, read_all
from acestep_consumer.config.upstream_settings import RENAMED, WITHOUT_EFFECT

_URL = TypeAdapter(AmqpDsn)
_BUCKET = re.compile(r"[A-Za-z0-9._-]{3,63}")


class SettingsError(Exception):
    """Settings are invalid; the message has one line per problem."""


def _split(value: object) -> object:
    """Parse comma-separated text into a tuple without blanks."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _networks(value: object) -> object:
    """Parse comma-separated CIDR blocks; a single address is a block of one."""
    parts = _split(value)
    return tuple(map(_network, parts)) if isinstance(parts, tuple) else parts


def _network(part: object) -> object:
    try:
        return ip_network(part) if isinstance(part, str) else part
    except ValueError as error:
        raise ValueError(f"{part!r} must be a network such as 10.20.0.0/16 or fd00::/8") from error


def _auto(value: object) -> object:
    """Parse ``auto`` as None: decided from the GPU, or at run time."""
    return None if isinstance(value, str) and value.strip().lower() == "auto" else value


def _workers(value: object) -> object:
    value = _auto(value)
    if isinstance(value, str) and not value.strip().isdecimal():
        raise ValueError("must be a number of jobs, 1 to 1024, or auto")
    return value


def _amqp_urls(value: SecretStr | str) -> tuple[SecretStr, ...]:
    urls = split_urls(value.get_secret_value() if isinstance(value, SecretStr) else value)
    # pydantic's own message would contain the URL, and with it the password.
    if not all(map(_is_amqp_url, urls)):
        raise ValueError(
            "must look like amqp://user:password@host:5672/vhost; for a cluster, one such URL a node, "
            f"comma-separated; an IPv6 address stands in brackets, as in [::1]:5672; {ENCODING}"
        )
    if problem := next(filter(None, map(problem_of_parameters, urls)), None):
        raise ValueError(problem)
    if any("," in urlsplit(url).path for url in urls):
        raise ValueError("each of several URLs must begin with amqp:// or amqps://; a comma in a virtual host is %2C")
    if len({unquote(urlsplit(url).path).removeprefix("/") or "/" for url in urls}) > 1:
        raise ValueError("the URLs must be of one cluster's nodes and name the same virtual host")
    return tuple(map(SecretStr, urls))


def _is_amqp_url(url: str) -> bool:
    try:
        _URL.validate_python(url)
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    return not has_raw_login(url) and _is_host(host)


def _is_host(host: str) -> bool:
    """Whether a name can be looked up: one that cannot be encoded for DNS breaks the look-up in Python."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return bool(host) and not any(each.isspace() or each == "," for each in host)


def _http_url(value: SecretStr | None) -> SecretStr | None:
    url = "" if value is None else value.get_secret_value()
    if value is not None and (has_raw_login(url) or not _is_http_url(url)):
        raise ValueError(f"must look like http://user:password@host:15672; {ENCODING}")
    return value


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(host) and port != 0 and _is_host(host)


def _endpoint(value: str | None) -> str | None:
    if value is None:
        return None
    if not _is_http_url(value):
        raise ValueError("must be a URL with its scheme, such as http://127.0.0.1:8333 or https://s3.example.org")
    parts = urlsplit(value)
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            "must be a URL without user, password and query; keys belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return value


def _bucket(name: str) -> str:
    if name.startswith("s3://"):
        raise ValueError(f"{name!r} must be the bucket's name alone, without s3://")
    if not _BUCKET.fullmatch(name):
        raise ValueError(
            f"{name!r} must be 3 to 63 letters, digits, dots, hyphens or underscores; folders belong in "
            "ACESTEP_S3_PREFIX, and in the keys of inputs"
        )
    return name


def _prefix(value: str) -> str:
    if "://" in value or {".", ".."}.intersection(value.split("/")):
        raise ValueError(f"{value!r} must be folders in the bucket, such as jobs or music/jobs: no URL, no . and no ..")
    return value


def _api_keys(value: SecretStr | str) -> tuple[SecretStr, ...]:
    """Parse one key a line; a key may contain any other character."""
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    keys = tuple(SecretStr(line.strip()) for line in text.splitlines() if line.strip())
    if any(not key.get_secret_value().isascii() or " " in key.get_secret_value() for key in keys):
        raise ValueError("a key must be ASCII without blanks, since it is sent in a header")
    return keys


def _lm_backend(value: object) -> object:
    """Parse ``mlx``, ACE-Step's backend for Apple machines, as ``pt``."""
    return "pt" if isinstance(value, str) and value.strip().lower() == "mlx" else value


def _quantization(value: object) -> object:
    """Parse ACE-Step's names: ``int8_weight_only``, and its words for none."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word in {"", "none", "false", "0", "auto"}:
        return None
    if word in {"fp8_weight_only", "w8a8_dynamic"}:
        raise ValueError(f"{word} is not there; int8 (weights only) is")
    return "int8" if word in {"int8_weight_only", "true", "1"} else word


def _checkpoints_here(given: object) -> object:
    """Return the folder that is there where ACE-Step's own server is started, if none is given."""
    here = Path.cwd() / "checkpoints"
    return here if given is None and here.is_dir() else given


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: the user's home folder is not known") from error


AmqpUrls = Annotated[tuple[SecretStr, ...], BeforeValidator(_amqp_urls)]
ApiKeys = Annotated[tuple[SecretStr, ...], BeforeValidator(_api_keys)]
List = Annotated[tuple[str, ...], BeforeValidator(_split)]
Bucket = Annotated[str, AfterValidator(_bucket)]
Buckets = Annotated[tuple[Bucket, ...], BeforeValidator(_split)]
Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_networks)]
_AUTO: Final = BeforeValidator(_auto)
AutoBool = Annotated[bool | None, _AUTO]
Workers = Annotated[Annotated[int, Field(ge=1, le=1024)] | None, BeforeValidator(_workers)]
LogLevel = Literal["debug", "info", "warning", "error"]
Path_ = Annotated[Path, AfterValidator(_expanded)]
Quantization = Literal["int8"]
QuantizationSetting = Annotated[Quantization | None, BeforeValidator(_quantization)]
LmBackend = Annotated[Literal["vllm", "pt"] | None, BeforeValidator(_lm_backend)]
CheckpointDir = Annotated[Path_ | None, BeforeValidator(_checkpoints_here)]


def variable(name: str, default: Any, about: str, **bounds: Any) -> Any:
    """Declare a setting: environment variable, default, and the description for the docs and ``run --help``."""
    return Field(default, validation_alias=AliasChoices(name), description=about, **bounds)


class Section(BaseModel):
    """A frozen group of settings; each field's alias is its environment variable."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", hide_input_in_errors=True, populate_by_name=True, allow_inf_nan=False
    )


class BrokerSettings(Section):
    """Broker: RabbitMQ's address, the queue limit, prefetch."""

    urls: AmqpUrls = variable(
        "ACESTEP_AMQP_URL",
        SecretStr("amqp://guest:guest@127.0.0.1:5672/"),
        "RabbitMQ URL, `amqp://` or `amqps://`; for a cluster, its nodes' URLs, comma-separated",
        validate_default=True,
    )
    queue_type: Literal["classic", "quorum"] = variable(
        "ACESTEP_QUEUE_TYPE", "classic", "`classic`: exact limit and priorities; `quorum`: replicated"
    )
    queue_maxsize: int = variable(
        "ACESTEP_QUEUE_MAXSIZE", 200, "most requests that may wait; further ones are rejected", ge=1, le=2**31 - 1
    )
    management_url: Annotated[SecretStr | None, AfterValidator(_http_url)] = variable(
        "ACESTEP_MANAGEMENT_URL",
        None,
        "RabbitMQ management API; with it, a changed queue limit takes effect at the next start",
    )
    consumer_timeout_s: float | None = variable(
        "ACESTEP_AMQP_CONSUMER_TIMEOUT_S",
        None,
        "the broker's `consumer_timeout` in seconds, if changed from its default; 0: off",
        ge=0,
    )
    queue_workers: Workers = variable(
        "ACESTEP_QUEUE_WORKERS", 1, "concurrent jobs per worker (prefetch); `auto`: tuned at run time"
    )
    queue_workers_max: int = variable(
        "ACESTEP_QUEUE_WORKERS_MAX", 256, "upper limit for `ACESTEP_QUEUE_WORKERS=auto`", ge=1, le=1024
    )
    max_message_bytes: int = variable(
        "ACESTEP_MAX_MESSAGE_BYTES", 1 << 20, "largest accepted request body, bytes", ge=1024, le=128 << 20
    )

    @property
    def url(self) -> SecretStr:
        """The first node's URL; virtual host and login are the same on all nodes."""
        return self.urls[0]

    @property
    def every_url(self) -> SecretStr:
        """All nodes' URLs, comma-separated."""
        return SecretStr(",".join(url.get_secret_value() for url in self.urls))

    @property
    def url_warnings(self) -> tuple[str, ...]:
        """Warnings about parameters of the URLs, each once; a worker logs them when it starts."""
        return tuple(dict.fromkeys(text for url in self.urls for text in warnings_of(url.get_secret_value())))

    route_by_tier: bool = variable(
        "ACESTEP_ROUTE_BY_TIER",
        False,  # noqa: FBT003 - a default
        "forward requests over this GPU's limits to a worker with a larger GPU, if there is one",
    )

    @property
    def workers_at_start(self) -> int:
        """The initial prefetch; 2 with ``auto``: one job renders while the next is fetched or uploaded."""
        return self.queue_workers or min(2, self.queue_workers_max)


class StorageSettings(Section):
    """Storage (S3): where results are stored."""

    endpoint: Annotated[str | None, AfterValidator(_endpoint)] = variable(
        "ACESTEP_S3_ENDPOINT", None, "S3 endpoint URL; unset: AWS"
    )
    bucket: Bucket = variable("ACESTEP_S3_BUCKET", "acestep", "bucket for results")
    create_bucket: bool = variable(
        "ACESTEP_S3_CREATE_BUCKET",
        False,  # noqa: FBT003 - a default
        "create the bucket at the start if it does not exist; otherwise that is an error",
    )
    prefix: Annotated[str, AfterValidator(_prefix)] = variable(
        "ACESTEP_S3_PREFIX", "jobs", "key prefix: `<prefix>/<task_id>/…`", max_length=256
    )
    presign_s: int = variable(
        "ACESTEP_S3_PRESIGN_SECONDS", 0, "lifetime of presigned URLs in events, seconds; 0: no URLs", ge=0, le=604_800
    )


class InputSettings(Section):
    """Audio inputs: allowed sources and size limits."""

    buckets: Buckets = variable(
        "ACESTEP_INPUT_BUCKETS", (), "additional buckets allowed for `s3://` inputs, comma-separated"
    )
    results: Literal["all", "none"] = variable(
        "ACESTEP_INPUT_RESULTS",
        "all",
        "`all`: inputs may be any song in the result bucket; `none`: results are no inputs, and other objects of that "
        "bucket only if `ACESTEP_INPUT_BUCKETS` names it",
    )
    hosts: List = variable("ACESTEP_INPUT_HOSTS", (), "hosts allowed for `https://` inputs, comma-separated")
    networks: Networks = variable(
        "ACESTEP_INPUT_NETWORKS",
        (),
        "private networks allowed for these hosts, such as `10.20.0.0/16`; none by default",
    )
    max_bytes: int = variable("ACESTEP_INPUT_MAX_BYTES", 256 << 20, "largest audio input, bytes", ge=1)
    lora_max_bytes: int = variable("ACESTEP_LORA_MAX_BYTES", 1 << 30, "largest LoRA file, bytes", ge=1)
    max_seconds: int = variable("ACESTEP_INPUT_MAX_SECONDS", 600, "longest audio input, seconds", ge=1, le=600)
    timeout_s: float = variable("ACESTEP_INPUT_TIMEOUT_S", 60, "timeout for fetching one input, seconds", gt=0)


class EngineSettings(Section):
    """Engine: models, device and memory of the renderer and planner processes."""

    config_path: str = variable(
        "ACESTEP_CONFIG_PATH", "acestep-v15-turbo", "primary DiT model: name, folder or Hugging Face id"
    )
    config_path2: str | None = variable("ACESTEP_CONFIG_PATH2", None, "second DiT model")
    config_path3: str | None = variable("ACESTEP_CONFIG_PATH3", None, "third DiT model")
    checkpoint_dir: CheckpointDir = variable(
        "ACESTEP_CHECKPOINT_DIR",
        None,
        "folder with one subfolder per model; unset: `checkpoints` in the working directory, if there is one",
        validate_default=True,
    )
    device: str = variable("ACESTEP_DEVICE", "auto", "renderer device: `auto`, `cuda`, `cuda:1`, `xpu`, `mps`, `cpu`")
    lanes: int = variable(
        "ACESTEP_API_WORKERS", 1, "accepted for compatibility, no effect: jobs share one batch", ge=1, le=64
    )
    pack_tokens: int = variable(
        "ACESTEP_PACK_TOKENS", 8192, "most tokens per batch (12.5 per second of audio); more gains nothing", ge=512
    )
    pack_wait_ms: float = variable(
        "ACESTEP_PACK_WAIT_MS", 5, "how long an idle renderer waits for more jobs to batch, ms", ge=0, le=1000
    )
    compile: AutoBool = variable("ACESTEP_COMPILE", None, "compile DiT and VAE with torch.compile; `auto`: on CUDA")
    cuda_mps: AutoBool = variable(
        "ACESTEP_CUDA_MPS",
        None,
        "let DiT and LM run on one GPU at the same time, through NVIDIA's MPS; `auto`: where its daemon can be started",
    )
    compile_cache: Path_ | None = variable(
        "ACESTEP_COMPILE_CACHE", None, "folder for compiled kernels; unset: in the user's cache folder"
    )
    keep_latents: bool = variable(
        "ACESTEP_KEEP_LATENTS",
        default=True,
        about="store each song's final latents beside it (3.2 kB a second), so that songs made from it start from them",
    )
    encoders: int | None = variable(
        "ACESTEP_ENCODERS",
        None,
        "processes that encode songs, at most one per CPU core, which the workers of `--gpus` share; unset: up to 16",
        ge=1,
    )
    score_table: Path_ | None = variable(
        "ACESTEP_SCORE_TABLE", None, "weights that `candidates` are scored by, a TOML file; unset: the built-in ones"
    )
    tags: bool = variable(
        "ACESTEP_TAGS",
        default=True,
        about="write tags into the files: title from the prompt, lyrics, model, seed, task id, and that it was "
        "generated",
    )
    max_vram_gb: float | None = variable("MAX_CUDA_VRAM", None, "treat the GPU as having this much memory, GB", gt=0)
    offload: AutoBool = variable(
        "ACESTEP_OFFLOAD_TO_CPU", None, "keep idle models in RAM; `auto`: on GPUs below 15.5 GB"
    )
    offload_dit: AutoBool = variable(
        "ACESTEP_OFFLOAD_DIT_TO_CPU", None, "offload the DiT as well; `auto`: like `ACESTEP_OFFLOAD_TO_CPU`"
    )
    quantization: QuantizationSetting = variable(
        "ACESTEP_QUANTIZATION",
        None,
        "`int8`: weights of DiT and LM in 8 bits, by torchao, which takes half their memory; meant for GPUs below "
        "20 GB; unset: as they are published, in bfloat16",
    )
    init_llm: AutoBool = variable(
        "ACESTEP_INIT_LLM", None, "load the 5Hz LM: `true`, `false`, or `auto` (the tier's default)"
    )
    lm_model_path: str | None = variable(
        "ACESTEP_LM_MODEL_PATH",
        None,
        "5Hz LM; unset: the tier's largest on the disk that leaves room for the renderer and half of the throughput",
    )
    lm_backend: LmBackend = variable(
        "ACESTEP_LM_BACKEND", None, "`vllm` or `pt` (transformers); unset: `vllm` if it works here, else `pt`"
    )
    lm_device: str = variable("ACESTEP_LM_DEVICE", "auto", "device of the 5Hz LM")
    lm_offload: AutoBool = variable("ACESTEP_LM_OFFLOAD_TO_CPU", None, "keep the idle LM in RAM; `auto`: no")
    hang_s: float = variable(
        "ACESTEP_ENGINE_HANG_S", 300, "replace an engine process that makes no progress for this many seconds", gt=0
    )
    ram_gb: float | None = variable(
        "ACESTEP_ENGINE_RAM_GB",
        None,
        "replace an engine process that uses more RAM than this, GB; unset: 90% of the total",
        gt=0,
    )
    scratch_dir: Path_ | None = variable("ACESTEP_SCRATCH_DIR", None, "folder for temporary files; unset: the system's")
    scratch_min_gb: float = variable(
        "ACESTEP_SCRATCH_MIN_GB",
        1,
        "minimum free GB there (a quarter of the disk if smaller); below it no jobs are taken",
        ge=0,
    )

    @property
    def models(self) -> tuple[str, ...]:
        """The DiT models to load, the primary first."""
        return tuple(path for path in (self.config_path, self.config_path2, self.config_path3) if path)


class WorkerSettings(Section):
    """Worker: identity, limits of jobs, health port, log."""

    worker_id: str | None = variable(
        "ACESTEP_WORKER_ID",
        None,
        "worker name in events and logs; unset: host name and process id",
        pattern=r"^[A-Za-z0-9_-]{1,128}$",
    )

    tier_table: Path_ | None = variable(
        "ACESTEP_TIER_TABLE", None, "tier table: `acestep-1.5-2026-06`, or a TOML file; unset: `acestep-1.5-2026-02`"
    )
    strict_requests: bool = variable(
        "ACESTEP_STRICT_REQUESTS",
        default=False,
        about="reject requests with a value that cannot be read or is out of range; `false`: use what ACE-Step would",
    )
    default_batch_size: int = variable(
        "ACESTEP_DEFAULT_BATCH_SIZE", 1, "songs of a request that does not say how many", ge=1, le=8
    )
    default_format: Literal["mp3", "wav", "wav32", "flac", "ogg", "opus", "aac"] = variable(
        "ACESTEP_DEFAULT_FORMAT", "mp3", "file format of a request that does not name one"
    )
    max_attempts: int = variable("ACESTEP_MAX_ATTEMPTS", 3, "attempts at a job whose engine process dies", ge=1, le=20)
    execution_timeout_s: float | None = variable(
        "ACESTEP_EXECUTION_TIMEOUT_S", None, "longest run of one job, seconds; unset: no limit", gt=0
    )
    http_port: int = variable(
        "ACESTEP_HTTP_PORT", 8080, "port for health checks and metrics; 0: any free port", ge=0, le=65535
    )
    http_host: str = variable("ACESTEP_HTTP_HOST", "127.0.0.1", "address for health checks and metrics")
    log_level: LogLevel = variable("ACESTEP_LOG_LEVEL", "info", "minimum log level")
    log_format: Literal["auto", "console", "json"] = variable(
        "ACESTEP_LOG_FORMAT", "auto", "`console`, `json`, or `auto`: JSON unless stderr is a terminal"
    )

    @property
    def request_defaults(self) -> dict[str, object]:
        """Defaults of fields that a request leaves out."""
        return {"batch_size": self.default_batch_size, "audio_format": self.default_format}

    @property
    def id_or_own(self) -> str:
        """``worker_id``; unset: this host's name and this process's id."""
        return self.worker_id or f"{socket.gethostname().split('.')[0]}-{os.getpid()}"


class GatewaySettings(Section):
    """Gateway: ACE-Step's REST API, `acestep-consumer gateway`. A worker uses none of these."""

    host: str = variable("ACESTEP_API_HOST", "127.0.0.1", "address of the REST API; others than loopback need a key")
    port: int = variable("ACESTEP_API_PORT", 8001, "port of the REST API; 0: any free port", ge=0, le=65535)
    keys: ApiKeys = variable("ACESTEP_API_KEY", (), "API key of the REST API, or several, one a line")
    origins: List = variable(
        "ACESTEP_API_ORIGINS",
        (),
        "web pages that may use the REST API besides those of this machine: origins such as `https://music.example`, "
        "comma-separated",
    )
    batch_size: int = variable(
        "ACESTEP_API_BATCH_SIZE", 2, "songs of a REST request that does not say how many", ge=1, le=8
    )
    queue_deadline_s: float = variable(
        "ACESTEP_API_QUEUE_DEADLINE_S",
        3600,
        "seconds that a REST request without `queue_deadline_s` may wait before it expires; 0: no limit",
        ge=0,
        le=604_800,
    )
    models: List = variable(
        "ACESTEP_API_MODELS",
        (),
        "models that the REST API names while no worker runs (scaled to zero), comma-separated",
    )
    tasks_per_minute: int = variable(
        "ACESTEP_API_TASKS_PER_MINUTE",
        0,
        "tasks that each key may ask one gateway for in a minute; 0: no limit",
        ge=0,
        le=1_000_000,
    )
    page: bool = variable(
        "ACESTEP_API_PAGE",
        False,  # noqa: FBT003 - a setting's default
        "serve the page of `listen` as well: everybody with a key sees all jobs and hears all songs",
    )
    generation_timeout_s: float = variable(
        "ACESTEP_GENERATION_TIMEOUT", 600, "longest wait of `/v1/chat/completions`, seconds", gt=0, le=86_400
    )


SECTIONS: dict[str, type[Section]] = {
    "broker": BrokerSettings,
    "storage": StorageSettings,
    "inputs": InputSettings,
    "engine": EngineSettings,
    "worker": WorkerSettings,
    "gateway": GatewaySettings,
}


SECRETS = ("ACESTEP_AMQP_URL", "ACESTEP_MANAGEMENT_URL", "ACESTEP_API_KEY")
"""Variables that contain secrets; each can be given as ``NAME_FILE`` instead."""


class Settings(BaseModel):
    """All settings, by section. Built by ``load``; its repr masks secrets.

    ``without_effect``: variables of ACE-Step's own server that are set and do nothing here, and why.
    """

    model_config = ConfigDict(frozen=True)

    without_effect: dict[str, str] = {}

    broker: BrokerSettings
    storage: StorageSettings
    inputs: InputSettings
    engine: EngineSettings
    worker: WorkerSettings
    gateway: GatewaySettings


def known_variables() -> frozenset[str]:
    """Return the names of all known environment variables."""
    return frozenset(name for name, _, _ in describe())


def describe() -> Iterator[tuple[str, str, str]]:
    """Yield (variable, default, description) of all settings, section by section."""
    for _, rows in describe_sections():
        yield from rows


def describe_sections() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield each section's title and its rows of (variable, default, description)."""
    for section in SECTIONS.values():
        yield (section.__doc__ or "").partition(":")[0], list(_describe_section(section))


def _describe_section(section: type[Section]) -> Iterator[tuple[str, str, str]]:
    for field in section.model_fields.values():
        name = variable_of(field)
        # None of a field that takes `auto` means just that.
        auto = field.default is None and _AUTO in field.metadata
        yield name, "auto" if auto else _shown(field.default), field.description or ""
        if name in SECRETS:
            yield name + SUFFIX, _shown(None), f"file that contains `{name}`"


def load(
    environ: Mapping[str, str] | None = None,
    env_file: Path | None = Path(".env"),
    overrides: Mapping[str, str] | None = None,
) -> Settings:
    """Load the settings. Precedence: ``overrides`` (command line), ``environ``, ``env_file``, defaults.

    Raises:
        SettingsError: a variable is unknown or a value is invalid; the message lists every problem.
    """
    layers = (_read_env_file(env_file), os.environ if environ is None else environ, overrides or {})
    values, problems = _read_layers(layers)
    sections: dict[str, Section] = {}
    for name, section in SECTIONS.items():
        try:
            sections[name] = section.model_validate(_pick(section, values))
        except ValidationError as error:
            problems += _explain(error, values)
    if problems:
        raise SettingsError("\n".join(problems))
    without_effect = {name: WITHOUT_EFFECT[name] for name in sorted(WITHOUT_EFFECT.keys() & values)}
    return Settings.model_validate({**sections, "without_effect": without_effect})


def _read_layers(layers: Iterable[Mapping[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Merge the layers, later ones over earlier ones, and read secret files. Returns the variables and all problems."""
    set_ = [{name: value for name, value in layer.items() if value.strip()} for layer in layers]
    if unreadable := [
        name for layer in set_ for name, value in layer.items() if name in known_variables() and "\0" in value
    ]:
        return {}, [f"{name}: contains a NUL character" for name in unreadable]
    try:
        values = layered(set_, SECRETS)
        values |= read_all(values, SECRETS)
    except SecretFileError as error:
        return {}, [str(error)]
    for there, here in RENAMED.items():
        if there in values:
            values.setdefault(here, values[there])
    return values, list(_unknown(values))


def _pick(section: type[Section], values: Mapping[str, str]) -> dict[str, str]:
    names = [variable_of(field) for field in section.model_fields.values()]
    return {name: values[name] for name in names if name in values}


def _read_env_file(path: Path | None) -> dict[str, str]:
    try:
        if path is None or not path.is_file():
            return {}
        # With or without a byte order mark, which some editors write.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text") from None  # the error itself quotes the bytes
    # Here and not above: a program that imports the client alone has no need of python-dotenv.
    from dotenv import dotenv_values  # noqa: PLC0415 - as said
    from dotenv.parser import parse_stream  # noqa: PLC0415 - as said

    for each in parse_stream(io.StringIO(text)):
        # python-dotenv skips such a line, and the setting would silently keep its default.
        if each.error or (each.key is not None and each.value is None):
            blank_lines = each.original.string.partition(each.original.string.lstrip())[0].count("\n")
            raise SettingsError(f"{path}, line {each.original.line + blank_lines}: not of the form NAME=value")
    return {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value is not None}


def _unknown(values: Mapping[str, str]) -> Iterator[str]:
    known = known_variables() | RENAMED.keys() | WITHOUT_EFFECT.keys()
    for name in sorted(values):
        if name in known:
            continue
        # A name with a mistake in its prefix may be another program's, unless it is very near.
        ours = name.upper().startswith("ACESTEP_")
        wanted = sorted(known - WITHOUT_EFFECT.keys())
        near = difflib.get_close_matches(name.upper(), wanted, n=1, cutoff=0.6 if ours else 0.85)
        if ours or (near and name.upper().startswith("ACE")):
            hint = f"did you mean {near[0]}?" if near else "unset it, or see `acestep-consumer run --help`"
            yield f"{name} is not a setting of this program; {hint}"


def _explain(error: ValidationError, values: Mapping[str, str]) -> Iterator[str]:
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        where = str(problem["loc"][0]) if problem["loc"] else "ACESTEP_AMQP_URL"
        if where + SUFFIX in values:
            where = f"{where}, as read from {where}{SUFFIX}"
        yield f"{where}: {problem['msg'].removeprefix('Value error, ')}"


def variable_of(field: Any) -> str:
    """Return the environment variable of a section's field."""
    return str(field.validation_alias.choices[0])


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "–"
    if isinstance(default, bool):
        return str(default).lower()  # as it is written in the environment
    return default.get_secret_value() if isinstance(default, SecretStr) else str(default)
