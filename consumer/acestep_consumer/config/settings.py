# SPDX-License-Identifier: Apache-2.0
"""What an operator sets: environment variables and ``.env``, read once, checked at once, passed down frozen.

A variable that starts with ``ACESTEP_`` and is not listed here stops the start: a typo must not become a default.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream
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

from acestep_consumer.config.amqp_urls import split_urls
from acestep_consumer.config.secret_files import SUFFIX, SecretFileError, layered, read_all

_URL = TypeAdapter(AmqpDsn)


class SettingsError(Exception):
    """The environment cannot be used; the text lists every problem, a line each."""


def _split(value: object) -> object:
    """Read comma-separated text as a tuple; blanks are dropped."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _networks(value: object) -> object:
    """Read comma-separated CIDR blocks; a single address is a block of one."""
    parts = _split(value)
    return tuple(map(_network, parts)) if isinstance(parts, tuple) else parts


def _network(part: object) -> object:
    try:
        return ip_network(part) if isinstance(part, str) else part
    except ValueError as error:
        raise ValueError(f"{part!r} must be a network such as 10.20.0.0/16 or fd00::/8") from error


def _auto(value: object) -> object:
    """Read ``auto`` as None: decided from the card, or while it works."""
    return None if isinstance(value, str) and value.strip().lower() == "auto" else value


def _workers(value: object) -> object:
    value = _auto(value)
    if isinstance(value, str) and not value.strip().isdecimal():
        raise ValueError("must be a number of jobs, 1 to 1024, or auto")
    return value


def _amqp_urls(value: SecretStr | str) -> tuple[SecretStr, ...]:
    urls = split_urls(value.get_secret_value() if isinstance(value, SecretStr) else value)
    try:
        for url in urls:
            _URL.validate_python(url)
    except ValidationError as error:
        # The text of pydantic's own error would repeat the URL, and with it the password.
        raise ValueError(
            "must look like amqp://user:password@host:5672/vhost; for a cluster, one such URL a node, comma-separated"
        ) from error
    if any("," in urlsplit(url).path for url in urls):
        raise ValueError("each of several URLs must begin with amqp:// or amqps://; a comma in a virtual host is %2C")
    if len({unquote(urlsplit(url).path).removeprefix("/") or "/" for url in urls}) > 1:
        raise ValueError("the URLs must be of one cluster's nodes and name the same virtual host")
    return tuple(map(SecretStr, urls))


def _http_url(value: SecretStr | None) -> SecretStr | None:
    parts = urlsplit("" if value is None else value.get_secret_value())
    if value is not None and (parts.scheme not in {"http", "https"} or not parts.hostname):
        raise ValueError("must look like http://user:password@host:15672")
    return value


AmqpUrls = Annotated[tuple[SecretStr, ...], BeforeValidator(_amqp_urls)]
List = Annotated[tuple[str, ...], BeforeValidator(_split)]
Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_networks)]
AutoBool = Annotated[bool | None, BeforeValidator(_auto)]
Workers = Annotated[Annotated[int, Field(ge=1, le=1024)] | None, BeforeValidator(_workers)]
Path_ = Annotated[Path, AfterValidator(Path.expanduser)]


def variable(name: str, default: Any, about: str, **bounds: Any) -> Any:
    """Declare a setting: its environment variable, its default, and the line that the README prints."""
    return Field(default, validation_alias=AliasChoices(name), description=about, **bounds)


class Section(BaseModel):
    """A frozen group of settings, each filled from the environment variable that is its alias."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True, populate_by_name=True)


class BrokerSettings(Section):
    """RabbitMQ: where it is, and how much it may hold."""

    urls: AmqpUrls = variable(
        "ACESTEP_AMQP_URL",
        SecretStr("amqp://guest:guest@127.0.0.1:5672/"),
        "broker, `amqp://` or `amqps://`; a cluster's nodes comma-separated, tried in turn",
        validate_default=True,
    )
    queue_type: Literal["classic", "quorum"] = variable(
        "ACESTEP_QUEUE_TYPE", "classic", "`classic`: exact limit, priorities; `quorum`: replicated"
    )
    queue_maxsize: int = variable("ACESTEP_QUEUE_MAXSIZE", 200, "messages that may wait; the next one is refused", ge=1)
    management_url: Annotated[SecretStr | None, AfterValidator(_http_url)] = variable(
        "ACESTEP_MANAGEMENT_URL", None, "RabbitMQ's management API: a changed limit then holds from the next start"
    )
    consumer_timeout_s: float | None = variable(
        "ACESTEP_AMQP_CONSUMER_TIMEOUT_S", None, "RabbitMQ's `consumer_timeout` in seconds, where changed; 0: off", ge=0
    )
    queue_workers: Workers = variable(
        "ACESTEP_QUEUE_WORKERS", 1, "jobs in this worker's hands (= prefetch); `auto`: as many as make it faster"
    )
    queue_workers_max: int = variable("ACESTEP_QUEUE_WORKERS_MAX", 64, "most workers that `auto` tries", ge=1, le=1024)
    max_message_bytes: int = variable(
        "ACESTEP_MAX_MESSAGE_BYTES", 1 << 20, "largest request body read, bytes", ge=1024, le=128 << 20
    )

    @property
    def url(self) -> SecretStr:
        """The first node's URL: virtual host and login are the same on all."""
        return self.urls[0]

    @property
    def every_url(self) -> SecretStr:
        """All nodes' URLs, comma-separated."""
        return SecretStr(",".join(url.get_secret_value() for url in self.urls))

    route_by_tier: bool = variable(
        "ACESTEP_ROUTE_BY_TIER",
        False,  # noqa: FBT003 - a default
        "what exceeds this card's limits goes on to a worker with a larger card, if there is one",
    )

    @property
    def workers_at_start(self) -> int:
        """The prefetch of the first consumer; with ``auto`` 2: one job renders while the next is fetched or stored."""
        return self.queue_workers or min(2, self.queue_workers_max)


class StorageSettings(Section):
    """S3: where results go."""

    endpoint: str | None = variable("ACESTEP_S3_ENDPOINT", None, "S3 endpoint URL; unset: AWS")
    bucket: str = variable("ACESTEP_S3_BUCKET", "acestep", "bucket for results", min_length=3, max_length=63)
    prefix: str = variable("ACESTEP_S3_PREFIX", "jobs", "key prefix: `<prefix>/<task_id>/…`", max_length=256)
    presign_s: int = variable(
        "ACESTEP_S3_PRESIGN_SECONDS", 0, "lifetime of presigned URLs in events, seconds; 0: none", ge=0, le=604_800
    )


class InputSettings(Section):
    """Audio inputs: which places a message may name, and how much it may bring."""

    buckets: List = variable("ACESTEP_INPUT_BUCKETS", (), "more buckets that `s3://` inputs may name, comma-separated")
    hosts: List = variable("ACESTEP_INPUT_HOSTS", (), "hosts that `https://` inputs may name, comma-separated")
    networks: Networks = variable(
        "ACESTEP_INPUT_NETWORKS", (), "private networks that these hosts may be in, such as `10.20.0.0/16`; none else"
    )
    max_bytes: int = variable("ACESTEP_INPUT_MAX_BYTES", 256 << 20, "largest audio input, bytes", ge=1)
    lora_max_bytes: int = variable("ACESTEP_LORA_MAX_BYTES", 1 << 30, "largest LoRA file, bytes", ge=1)
    max_seconds: int = variable("ACESTEP_INPUT_MAX_SECONDS", 600, "longest audio input, seconds", ge=1, le=600)
    timeout_s: float = variable("ACESTEP_INPUT_TIMEOUT_S", 60, "time to fetch one input, seconds", gt=0)


class EngineSettings(Section):
    """The renderer and planner processes: models, device, memory."""

    config_path: str = variable("ACESTEP_CONFIG_PATH", "acestep-v15-turbo", "primary DiT model: name, folder or hub id")
    config_path2: str | None = variable("ACESTEP_CONFIG_PATH2", None, "second DiT model")
    config_path3: str | None = variable("ACESTEP_CONFIG_PATH3", None, "third DiT model")
    checkpoint_dir: Path_ | None = variable("ACESTEP_CHECKPOINT_DIR", None, "folder that holds checkpoints by name")
    device: str = variable("ACESTEP_DEVICE", "auto", "`auto`, `cuda`, `cuda:1`, `xpu`, `mps`, `cpu`")
    lanes: int = variable("ACESTEP_API_WORKERS", 1, "no effect here: jobs share one batch, not threads", ge=1, le=64)
    pack_tokens: int = variable(
        "ACESTEP_PACK_TOKENS", 8192, "largest pack, tokens (12.5 are a second of song); more gains nothing", ge=512
    )
    pack_wait_ms: float = variable(
        "ACESTEP_PACK_WAIT_MS", 5, "how long an idle renderer waits for a job's company, ms", ge=0, le=1000
    )
    compile: AutoBool = variable("ACESTEP_COMPILE", None, "compile DiT and VAE; `auto`: on CUDA")
    compile_cache: Path_ | None = variable(
        "ACESTEP_COMPILE_CACHE", None, "folder of compiled kernels; unset: in the user's cache folder"
    )
    max_vram_gb: float | None = variable("MAX_CUDA_VRAM", None, "pretend that the card has this many GB", gt=0)
    offload: AutoBool = variable("ACESTEP_OFFLOAD_TO_CPU", None, "keep idle models in RAM; `auto`: below 15.5 GB")
    offload_dit: AutoBool = variable("ACESTEP_OFFLOAD_DIT_TO_CPU", None, "the DiT too; `auto`: as the models")
    init_llm: AutoBool = variable(
        "ACESTEP_INIT_LLM", None, "load the 5Hz LM: `auto` (as the tier says), `true`, `false`"
    )
    lm_model_path: str | None = variable(
        "ACESTEP_LM_MODEL_PATH", None, "5Hz LM; unset: the tier's largest that leaves the renderer room"
    )
    lm_backend: Literal["vllm", "pt"] | None = variable(
        "ACESTEP_LM_BACKEND", None, "`vllm` or `pt` (transformers); unset: `vllm` where it works, else `pt`"
    )
    lm_device: str = variable("ACESTEP_LM_DEVICE", "auto", "device of the 5Hz LM")
    lm_offload: AutoBool = variable("ACESTEP_LM_OFFLOAD_TO_CPU", None, "keep the idle LM in RAM")
    hang_s: float = variable(
        "ACESTEP_ENGINE_HANG_S", 300, "an engine process that makes no progress for so many seconds is replaced", gt=0
    )
    ram_gb: float | None = variable(
        "ACESTEP_ENGINE_RAM_GB", None, "an engine process that holds more RAM, GB, is replaced; unset: 90% of all", gt=0
    )
    scratch_dir: Path_ | None = variable("ACESTEP_SCRATCH_DIR", None, "folder for work files; unset: the system's")
    scratch_min_gb: float = variable(
        "ACESTEP_SCRATCH_MIN_GB", 1, "GB free there, or a quarter of a small disk: with less, no job is taken", ge=0
    )

    @property
    def models(self) -> tuple[str, ...]:
        """The DiT models to load, the primary first."""
        return tuple(path for path in (self.config_path, self.config_path2, self.config_path3) if path)


class WorkerSettings(Section):
    """The worker as a whole."""

    worker_id: str | None = variable(
        "ACESTEP_WORKER_ID", None, "name in events; unset: host name and a number", pattern=r"^[A-Za-z0-9_-]{1,128}$"
    )
    tier_table: Path_ | None = variable("ACESTEP_TIER_TABLE", None, "TOML file in place of the built-in tier table")
    max_attempts: int = variable("ACESTEP_MAX_ATTEMPTS", 3, "tries of a job whose engine process dies", ge=1, le=20)
    execution_timeout_s: float | None = variable(
        "ACESTEP_EXECUTION_TIMEOUT_S", None, "longest run of one job, seconds; unset: no limit", gt=0
    )
    http_port: int = variable("ACESTEP_HTTP_PORT", 8080, "health and metrics; 0: a free port", ge=0, le=65535)
    http_host: str = variable("ACESTEP_HTTP_HOST", "127.0.0.1", "address that health and metrics listen on")
    log_level: Literal["debug", "info", "warning", "error"] = variable("ACESTEP_LOG_LEVEL", "info", "lowest level")
    log_format: Literal["auto", "console", "json"] = variable(
        "ACESTEP_LOG_FORMAT", "auto", "`auto`: JSON unless a terminal"
    )


SECTIONS: dict[str, type[Section]] = {
    "broker": BrokerSettings,
    "storage": StorageSettings,
    "inputs": InputSettings,
    "engine": EngineSettings,
    "worker": WorkerSettings,
}


SECRETS = ("ACESTEP_AMQP_URL", "ACESTEP_MANAGEMENT_URL")
"""Variables with passwords in them: each may be given as a file instead."""


class Settings(BaseModel):
    """All sections. Built by ``load``; the repr masks secrets."""

    model_config = ConfigDict(frozen=True)

    broker: BrokerSettings
    storage: StorageSettings
    inputs: InputSettings
    engine: EngineSettings
    worker: WorkerSettings


def known_variables() -> frozenset[str]:
    """Return the names of all environment variables that are read."""
    return frozenset(name for name, _, _ in describe())


def describe() -> Iterator[tuple[str, str, str]]:
    """Yield (variable, default, description) in the order of the README's table."""
    for section in SECTIONS.values():
        for field in section.model_fields.values():
            name = variable_of(field)
            yield name, _shown(field.default), field.description or ""
            if name in SECRETS:
                yield name + SUFFIX, _shown(None), f"a file that holds `{name}`, to be set in its place"


def load(
    environ: Mapping[str, str] | None = None,
    env_file: Path | None = Path(".env"),
    overrides: Mapping[str, str] | None = None,
) -> Settings:
    """Read the settings: ``overrides`` (the command line) over ``environ`` over ``env_file`` over defaults.

    Raises:
        SettingsError: a name is unknown or a value is malformed; every problem is listed.
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
    return Settings.model_validate(sections)


def _read_layers(layers: Iterable[Mapping[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Return all variables, the last layer on top, secrets read from their files; and what is wrong with them."""
    set_ = [{name: value for name, value in layer.items() if value.strip()} for layer in layers]
    try:
        values = layered(set_, SECRETS)
        values |= read_all(values, SECRETS)
    except SecretFileError as error:
        return {}, [str(error)]
    return values, list(_unknown(values))


def _pick(section: type[Section], values: Mapping[str, str]) -> dict[str, str]:
    names = [variable_of(field) for field in section.model_fields.values()]
    return {name: values[name] for name in names if name in values}


def _read_env_file(path: Path | None) -> dict[str, str]:
    if path is None or not path.is_file():
        return {}
    with path.open(encoding="utf-8") as lines:
        wrong = [binding.original.line for binding in parse_stream(lines) if binding.error]
    if wrong:
        # The library would leave such a line out, and a default take the place of what it was to set.
        raise SettingsError(f"{path}, line {wrong[0]}: not of the form NAME=value")
    return {name: value for name, value in dotenv_values(path).items() if value is not None}


def _unknown(values: Mapping[str, str]) -> Iterator[str]:
    known = known_variables()
    for name in sorted(values):
        if name.startswith("ACESTEP_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
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
