# SPDX-License-Identifier: Apache-2.0
"""The model checks of ``doctor``: each configured DiT, and the language model for this GPU."""

from collections.abc import AsyncGenerator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from acestep_consumer.commands.doctor.machine import Machine
from acestep_consumer.commands.doctor.report import Finding, fail, ok, skip, warn
from acestep_consumer.commands.plan.gpu import DeviceMissing
from acestep_consumer.commands.threads import run_in_thread
from acestep_consumer.config.settings import EngineSettings, Settings
from acestep_consumer.engine.hub_cache import is_offline, snapshot
from acestep_consumer.engine.planner import registry as lms
from acestep_consumer.engine.planner.vllm_versions import version_fault
from acestep_consumer.engine.published_models import PUBLISHED, pull_command
from acestep_consumer.engine.renderer.checkpoints.component_files import faults_of_lm, faults_of_pipeline
from acestep_consumer.engine.renderer.checkpoints.original_layout import open_original
from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError, resolve
from acestep_consumer.policy.lm_choice import LmPlan, plan_lm
from acestep_consumer.policy.tiers import TierTableError, load_table

_AT_START: Final = "the first start downloads it, which takes minutes; download it before with:"


async def check_models(settings: EngineSettings, environ: Mapping[str, str]) -> AsyncGenerator[Finding]:
    """Check each configured DiT model."""
    for name in dict.fromkeys(settings.models):
        yield await run_in_thread(partial(judge_model, name, settings.checkpoint_dir, environ))


async def check_lm(settings: Settings, machine: Machine, environ: Mapping[str, str]) -> AsyncGenerator[Finding]:
    """Check the language model that a worker would load here."""
    engine = settings.engine
    try:
        vram_gb = (await machine.gpu()).vram_gb
        tier = load_table(settings.worker.tier_table).tier_of(vram_gb)
    except (DeviceMissing, TierTableError):
        yield skip("language model", "it depends on the GPU's tier")
        return
    plan = plan_lm(await run_in_thread(lambda: lms.lm_request(engine, environ)), tier, vram_gb)
    if plan is None:
        reason = "ACESTEP_INIT_LLM is false" if engine.init_llm is False else f"{tier.name} default"
        yield ok("language model", f"none ({reason}); requests that need it will fail")
        return
    for warning in plan.warnings:
        yield warn("language model", warning)
    yield await run_in_thread(lambda: judge_lm(plan, engine.checkpoint_dir, environ))
    if (finding := judge_vllm(engine, vram_gb)) is not None:
        yield finding


_WITHOUT_LM: Final = "put it there, or set ACESTEP_LM_MODEL_PATH; ACESTEP_INIT_LLM=false runs without it"


def judge_model(name: str, checkpoint_dir: Path | None, environ: Mapping[str, str]) -> Finding:
    """Report whether a DiT model's checkpoint exists and is complete."""
    check = f"model {name}"
    try:
        checkpoint = resolve(name, checkpoint_dir, environ)
    except CheckpointError as error:
        said, _, cure = str(error).partition(". ")
        return fail(check, said, cure or "set ACESTEP_CHECKPOINT_DIR or ACESTEP_CONFIG_PATH")
    if checkpoint.original and checkpoint.folder is not None:
        return _original(check, checkpoint.folder, checkpoint_dir)
    if checkpoint.folder is None:
        return _from_hub(check, checkpoint.hub_id or name, environ)
    return _complete(check, checkpoint.folder, tuple(faults_of_pipeline(checkpoint.folder)))


def _original(check: str, place: Path, checkpoint_dir: Path | None) -> Finding:
    """Check a folder or a file as ``run`` does before it loads it, with the VAE and the text encoder beside it."""
    try:
        open_original(place, checkpoint_dir)
    except CheckpointError as error:
        said, mark, cure = str(error).partition(": download")
        return fail(check, said, f"download{cure}" if mark else "put there what is missing, or take another file")
    return ok(check, f"{place} is complete")


def judge_lm(plan: LmPlan, checkpoint_dir: Path | None, environ: Mapping[str, str]) -> Finding:
    """Report whether the language model exists and is complete. A worker starts without it unless it is required."""
    check = "language model"
    try:
        place = lms.resolve(plan.model, checkpoint_dir)
    except lms.LmNotFound as error:
        said, fix = str(error).partition(";")[0], _WITHOUT_LM
        return fail(check, said, fix) if plan.required else warn(check, f"{said}; a worker starts without it", fix)
    hub_id = place.hub_id or plan.model
    folder = place.folder or snapshot(hub_id, environ)
    if folder is None:
        return _from_hub(check, hub_id, environ)
    return _complete(check, folder, tuple(faults_of_lm(folder)))


def judge_vllm(engine: EngineSettings, vram_gb: float) -> Finding | None:
    """Report a vLLM that is missing or does not fit, where it is insisted on, or would be used on a GPU."""
    if engine.lm_backend == "pt" or (fault := version_fault()) is None:
        return None
    said, _, fix = fault.rpartition(": ")
    if engine.lm_backend == "vllm":
        return fail("vLLM", f"ACESTEP_LM_BACKEND is vllm, but {said}", f"{fix}, or unset ACESTEP_LM_BACKEND")
    if not vram_gb or engine.lm_offload:
        return None
    said = f"{said}; the language model runs on transformers, which is slower"
    return warn("vLLM", said, f"{fix}, or ACESTEP_LM_BACKEND=pt to silence this")


def _complete(check: str, folder: Path, faults: tuple[str, ...]) -> Finding:
    if faults:
        again = "download or convert the checkpoint again"
        cure = pull_command(folder.name, checkpoints=folder.parent) if folder.name in PUBLISHED else again
        return fail(check, "\n".join((f"{folder} is incomplete:", *faults)), cure)
    return ok(check, f"{folder} is complete")


def _from_hub(check: str, hub_id: str, environ: Mapping[str, str]) -> Finding:
    if is_offline(environ):
        said = f"{hub_id} is not on this disk, and HF_HUB_OFFLINE forbids the download"
        return fail(check, said, f"unset it, or download the model elsewhere with: {_download(hub_id)}")
    said = f"{hub_id} is not on this disk yet, but on the Hugging Face hub"
    return warn(check, said, f"{_AT_START} {_download(hub_id)}")


def _download(hub_id: str) -> str:
    """Return the command for a repository: ours for a published model, else that of the Hugging Face client."""
    name = hub_id.rpartition("/")[2]
    published = name in PUBLISHED and PUBLISHED[name].repository == hub_id
    return pull_command(name, checkpoints=None) if published else f"hf download {hub_id}"
