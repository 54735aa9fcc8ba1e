# SPDX-License-Identifier: Apache-2.0
"""The model checks of ``doctor``: each configured DiT, and the language model for this GPU."""

import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from acestep_consumer.commands.doctor.checkpoint import faults_of_lm, faults_of_pipeline
from acestep_consumer.commands.doctor.machine import Machine
from acestep_consumer.commands.doctor.report import Finding, fail, ok, skip, warn
from acestep_consumer.commands.plan.gpu import DeviceMissing
from acestep_consumer.commands.threads import run_in_thread
from acestep_consumer.config.settings import EngineSettings, Settings
from acestep_consumer.engine.planner import registry as lms
from acestep_consumer.engine.renderer.registry import CheckpointError, resolve
from acestep_consumer.policy.lm_choice import LmPlan, LmRequest, plan_lm
from acestep_consumer.policy.tiers import TierTableError, load_table

_TRUE: Final = {"1", "on", "yes", "true"}
_AT_START: Final = "the first start downloads it, which takes minutes; download it before with: hf download"


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
    plan = plan_lm(
        LmRequest(init=engine.init_llm, model=engine.lm_model_path, backend=engine.lm_backend), tier, vram_gb
    )
    if plan is None:
        reason = "ACESTEP_INIT_LLM is false" if engine.init_llm is False else f"{tier.name} default"
        yield ok("language model", f"none ({reason}); requests that need it will fail")
        return
    for warning in plan.warnings:
        yield warn("language model", warning)
    yield await run_in_thread(lambda: judge_lm(plan, engine.checkpoint_dir, environ))
    if engine.lm_backend == "vllm" and find_spec("vllm") is None:
        yield fail("language model", "ACESTEP_LM_BACKEND is vllm, but vLLM is not installed", _VLLM)


_WITHOUT_LM: Final = "put it there, or set ACESTEP_LM_MODEL_PATH; ACESTEP_INIT_LLM=false runs without it"
_VLLM: Final = "pip install 'acestep-consumer[vllm]', or unset ACESTEP_LM_BACKEND"


def judge_model(name: str, checkpoint_dir: Path | None, environ: Mapping[str, str]) -> Finding:
    """Report whether a DiT model's checkpoint exists and is complete."""
    check = f"model {name}"
    try:
        checkpoint = resolve(name, checkpoint_dir)
    except CheckpointError as error:
        said, _, cure = str(error).partition(". ")
        return fail(check, said, cure or "set ACESTEP_CHECKPOINT_DIR or ACESTEP_CONFIG_PATH")
    folder = checkpoint.folder or _snapshot(checkpoint.hub_id, environ)
    if folder is None:
        return _from_hub(check, checkpoint.hub_id or name, environ)
    return _complete(check, folder, tuple(faults_of_pipeline(folder)))


def judge_lm(plan: LmPlan, checkpoint_dir: Path | None, environ: Mapping[str, str]) -> Finding:
    """Report whether the language model exists and is complete. A worker starts without it unless it is required."""
    check = "language model"
    try:
        place = lms.resolve(plan.model, checkpoint_dir)
    except lms.LmNotFound as error:
        said, fix = str(error).partition(";")[0], _WITHOUT_LM
        return fail(check, said, fix) if plan.required else warn(check, f"{said}; a worker starts without it", fix)
    folder = place.folder or _snapshot(place.hub_id, environ)
    if folder is None:
        return _from_hub(check, place.hub_id or plan.model, environ)
    return _complete(check, folder, tuple(faults_of_lm(folder)))


def _complete(check: str, folder: Path, faults: tuple[str, ...]) -> Finding:
    if faults:
        return fail(check, "\n".join((f"{folder} is incomplete:", *faults)), "download or convert the checkpoint again")
    return ok(check, f"{folder} is complete")


def _from_hub(check: str, hub_id: str, environ: Mapping[str, str]) -> Finding:
    if environ.get("HF_HUB_OFFLINE", "").strip().lower() in _TRUE:
        said = f"{hub_id} is not on this disk, and HF_HUB_OFFLINE forbids the download"
        return fail(check, said, f"unset it, or download the model elsewhere with: hf download {hub_id}")
    return warn(check, f"{hub_id} is not on this disk yet, but on the Hugging Face hub", f"{_AT_START} {hub_id}")


def _snapshot(hub_id: str | None, environ: Mapping[str, str]) -> Path | None:
    """Return the newest snapshot in the cache of the Hugging Face client."""
    if hub_id is None:
        return None
    root = _cache(environ) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    return max(_folders(root), key=os.path.getmtime, default=None)


def _folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (path for path in root.iterdir() if path.is_dir())


def _cache(environ: Mapping[str, str]) -> Path:
    """Return the cache folder, from the same variables as the Hugging Face client."""
    if given := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given).expanduser()
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home).expanduser() / "hub"
