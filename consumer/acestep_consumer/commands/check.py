# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer check`: says what a worker of a given tier makes of a request, without a broker and a model."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.commands.base import print_error, print_warning
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import EngineSettings, Settings
from acestep_consumer.domain import edits
from acestep_consumer.domain.errors import ConsumerError
from acestep_consumer.domain.job import Job, LoadedModel, Request
from acestep_consumer.domain.parse import FORM, RequestRules, parse
from acestep_consumer.domain.ports import BodyFormat
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.policy.admit import Limits, admit
from acestep_consumer.policy.tiers import LMS, Tier, TierTable, TierTableError, load_table
from acestep_schemas.events import LmChoice
from acestep_schemas.request import GenerationRequest

STDIN = Path("-")

# A message without an id gets one; seeds that are drawn from this one say nothing.
_NO_ID = "check"
_NOT_LOOKED_UP = "source_task_id = {}: only a worker looks it up, so what is taken over from that song is not shown"
_DRAWN = ("seed", "use_random_seed", "retake_seed")


class CheckFailed(Exception):
    """A body or a tier is missing; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """The body, and the worker that is assumed.

    Attributes:
        file: the body; ``-`` is standard input.
        form: it is a form, not JSON.
        strict: reject wrong values, as with ``ACESTEP_STRICT_REQUESTS``.
        tier: name of a tier; None: the one of ``vram_gb``.
        vram_gb: memory of the GPU; None: that of ``MAX_CUDA_VRAM``, else the largest tier's.
        lm: whether a language model is loaded; None: ``ACESTEP_INIT_LLM``, else as the tier does.
        as_json: print JSON.
    """

    file: Path
    form: bool = False
    strict: bool = False
    tier: str | None = None
    vram_gb: float | None = None
    lm: bool | None = None
    as_json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The job that the body becomes, or the error that it is rejected or fails with."""

    limits: Limits
    job: Job | None
    error: ConsumerError | None

    def request(self) -> dict[str, Any]:
        """Return the effective request, without an id and seeds that were made up."""
        if self.job is None:
            return {}
        made_up = {name for name in _DRAWN if name not in self.job.given}
        if self.job.task_id == _NO_ID:
            made_up.add("task_id")
        return self.job.request.model_dump(mode="json", exclude=made_up)

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        limits, job, error = self.limits, self.job, self.error
        return {
            "accepted": job is not None,
            "tier": limits.tier.name,
            "table_version": limits.table_version,
            "model": None if job is None else job.model.model_dump(mode="json"),
            "lm": None if job is None or job.lm is None else job.lm.model,
            "request": self.request() or None,
            "adjustments": [] if job is None else [each.model_dump(mode="json") for each in job.policy.adjustments],
            "edits": [] if job is None else [each.model_dump(mode="json") for each in job.edits],
            "warnings": [] if job is None else list(job.warnings),
            "error": None
            if error is None
            else {"code": error.code, "message": str(error), "retryable": error.retryable, "details": error.details},
        }


def check(settings: Settings, options: CheckOptions, note: Console) -> Exit:
    """Print what a worker makes of the body: ``JOB_FAILED`` where it makes no song of it."""
    try:
        report = examine(settings, options, _read(options.file))
    except (CheckFailed, TierTableError) as error:
        print_error(str(error), note)
        return Exit.USAGE
    if options.as_json:
        sys.stdout.write(json.dumps(report.as_json()) + "\n")
    else:
        _show(report, Console(highlight=False), note)
    return Exit.DONE if report.job is not None else Exit.JOB_FAILED


def examine(settings: Settings, options: CheckOptions, body: bytes) -> CheckReport:
    """Read and admit a body as the assumed worker does. Raises ``CheckFailed`` and ``TierTableError``."""
    worker = settings.worker
    rules = RequestRules(
        max_bytes=settings.broker.max_message_bytes,
        strict=options.strict or worker.strict_requests,
        defaults=worker.request_defaults,
    )
    limits = _limits(settings.engine, load_table(worker.tier_table), options)
    job: Job | None = None
    failure: ConsumerError | None = None
    try:
        job = admit(
            _resolved(parse(body, _NO_ID, rules, BodyFormat(content_type=FORM if options.form else None))), limits
        )
    except ConsumerError as error:
        failure = error
    return CheckReport(limits=limits, job=job, error=failure)


def _resolved(request: Request) -> Request:
    """Return the request with what its edits stand for. Only a worker looks up the song that it names."""
    asked = request.body
    if not edits.concerns(asked):
        return request
    edits.check(asked)
    if asked.source_task_id is not None:
        return replace(request, warnings=(*request.warnings, _NOT_LOOKED_UP.format(asked.source_task_id)))
    return edits.resolve(asked, None).applied_to(request)


def _read(file: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == STDIN else file.read_bytes()
    except OSError as error:
        raise CheckFailed(f"{file} cannot be read: {error.strerror}") from error


def _limits(engine: EngineSettings, table: TierTable, options: CheckOptions) -> Limits:
    vram_gb = engine.max_vram_gb if options.vram_gb is None else options.vram_gb
    tier = _tier(table, options.tier, vram_gb)
    with_lm = tier.lm_by_default if engine.init_llm is None else engine.init_llm
    if options.lm is not None:
        with_lm = options.lm
    named = (engine.lm_model_path or "").rstrip("/").rpartition("/")[2]
    lm = LmChoice(model=named or (tier.lms or LMS)[-1 if tier.lms else 0], backend=engine.lm_backend or "vllm")
    return Limits(
        tier=tier,
        table_version=table.version,
        vram_gb=vram_gb or 0.0,
        models=tuple(LoadedModel(_last(name), _variant(_last(name))) for name in engine.models),
        formats=frozenset(FORMATS),
        lm=lm if with_lm else None,
    )


def _tier(table: TierTable, name: str | None, vram_gb: float | None) -> Tier:
    if name is None:
        return table.tiers[-1] if vram_gb is None else table.tier_of(vram_gb)
    names = {tier.name: tier for tier in table.tiers}
    if name not in names:
        raise CheckFailed(f"--tier {name}: {table.version} has {', '.join(names)}")
    return names[name]


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _variant(name: str) -> Variant:
    """Return the family by the name alone; a worker reads it from the model's configuration."""
    words = name.lower().split("-")
    if "turbo" in words:
        return Variant.TURBO
    return Variant.SFT if "sft" in words and "base" not in words else Variant.BASE


def _show(report: CheckReport, console: Console, note: Console) -> None:
    limits = report.limits
    where = f"by a worker of {limits.tier.name} ({limits.table_version})"
    if report.job is None or report.error is not None:
        state = getattr(report.error, "status", "rejected")
        print_error(f"{state} {where} ({report.error.code if report.error else ''}): {report.error}", note)
        return
    job = report.job
    with_lm = f"with {job.lm.model}" if job.lm else "without the language model"
    console.print(f"Accepted {where}, {with_lm}, on {job.model.used}", markup=False, soft_wrap=True)
    console.print(_table(report.request()))
    for change in job.policy.adjustments:
        text = f"adjusted {change.field} from {change.requested} to {change.applied}: {change.reason}"
        console.print(text, markup=False, soft_wrap=True)
    for edit in job.edits:
        console.print(f"set {edit.field} to {edit.value}: {edit.because}", markup=False, soft_wrap=True)
    for warning in job.warnings:
        print_warning(warning, note)


def _table(request: dict[str, Any]) -> Table:
    """Return the fields that differ from their defaults, and those that everybody wants to know."""
    default = GenerationRequest().model_dump(mode="json")
    always = ("task_type", "audio_duration", "batch_size", "audio_format")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("field", style="cyan", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in request.items():
        if name in always or value != default.get(name):
            table.add_row(name, escape("not given" if value is None else str(value)))
    return table
