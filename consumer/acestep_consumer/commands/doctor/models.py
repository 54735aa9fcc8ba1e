# SPDX-License-Identifier: Apache-2.0
"""``doctor`` on the models: each DiT that the settings name, and the language model that the card would get."""

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
from acestep_consumer.commands.threads import aside
from acestep_consumer.config.settings import EngineSettings, Settings
from acestep_consumer.engine.planner import registry as lms
from acestep_consumer.engine.renderer.registry import CheckpointError, resolve
from acestep_consumer.policy.lm_choice import LmPlan, LmRequest, plan_lm
from acestep_consumer.policy.tiers import TierTableError, load_table

_TRUE: Final = {"1", "on", "yes", "true"}
_AT_START: Final = "the first start fetches it, which takes minutes; fetch it before with: hf download"


async def look_at_models(settings: EngineSettings, environ: Mapping[str, str]) -> AsyncGenerator[Finding]:
    """Look at each configured DiT model's folder."""
    for name in dict.fromkeys(settings.models):
        yield await aside(partial(judge_model, name, settings.checkpoint_dir, environ))


async def look_at_lm(settings: Settings, machine: Machine, environ: Mapping[str, str]) -> AsyncGenerator[Finding]:
    """Look at the folder of the language model that a worker would load here."""
    engine = settings.engine
    try:
        vram_gb = (await machine.card()).vram_gb
        tier = load_table(settings.worker.tier_table).tier_of(vram_gb)
    except (DeviceMissing, TierTableError):
        yield skip("language model", "which one it is depends on the card's tier")
        return
    plan = plan_lm(
        LmRequest(init=engine.init_llm, model=engine.lm_model_path, backend=engine.lm_backend), tier, vram_gb
    )
    if plan is None:
        because = "ACESTEP_INIT_LLM is false" if engine.init_llm is False else f"{tier.name} loads none by itself"
        yield ok("language model", f"none: {because}; requests that need it end as failed")
        return
    for warning in plan.warnings:
        yield warn("language model", warning)
    yield await aside(lambda: judge_lm(plan, engine.checkpoint_dir, environ))
    if engine.lm_backend == "vllm" and find_spec("vllm") is None:
        yield fail("language model", "ACESTEP_LM_BACKEND is vllm, and vLLM is not installed", _VLLM)


_WITHOUT_LM: Final = "put it there, or set ACESTEP_LM_MODEL_PATH; ACESTEP_INIT_LLM=false does without"
_VLLM: Final = "pip install 'acestep-consumer[vllm]', or unset ACESTEP_LM_BACKEND"


def judge_model(name: str, checkpoint_dir: Path | None, environ: Mapping[str, str]) -> Finding:
    """Say whether a DiT model's checkpoint is there and whole."""
    check = f"model {name}"
    try:
        checkpoint = resolve(name, checkpoint_dir)
    except CheckpointError as error:
        said, _, cure = str(error).partition(". ")
        return fail(check, said, cure or "set ACESTEP_CHECKPOINT_DIR or ACESTEP_CONFIG_PATH")
    folder = checkpoint.folder or _snapshot(checkpoint.hub_id, environ)
    if folder is None:
        return _from_hub(check, checkpoint.hub_id or name, environ)
    return _whole(check, folder, tuple(faults_of_pipeline(folder)))


def judge_lm(plan: LmPlan, checkpoint_dir: Path | None, environ: Mapping[str, str]) -> Finding:
    """Say whether the language model is there and whole. Without it a worker starts, unless it is insisted on."""
    check = "language model"
    try:
        place = lms.resolve(plan.model, checkpoint_dir)
    except lms.LmNotFound as error:
        said, fix = str(error).partition(";")[0], _WITHOUT_LM
        return fail(check, said, fix) if plan.required else warn(check, f"{said}; a worker starts without", fix)
    folder = place.folder or _snapshot(place.hub_id, environ)
    if folder is None:
        return _from_hub(check, place.hub_id or plan.model, environ)
    return _whole(check, folder, tuple(faults_of_lm(folder)))


def _whole(check: str, folder: Path, faults: tuple[str, ...]) -> Finding:
    if faults:
        return fail(check, "\n".join((f"{folder} is not whole:", *faults)), "fetch or convert the checkpoint again")
    return ok(check, f"{folder} is whole")


def _from_hub(check: str, hub_id: str, environ: Mapping[str, str]) -> Finding:
    if environ.get("HF_HUB_OFFLINE", "").strip().lower() in _TRUE:
        said = f"{hub_id} is not on this disk, and HF_HUB_OFFLINE forbids fetching it"
        return fail(check, said, f"unset it, or fetch the model elsewhere with: hf download {hub_id}")
    return warn(check, f"{hub_id} is on the hub and not on this disk", f"{_AT_START} {hub_id}")


def _snapshot(hub_id: str | None, environ: Mapping[str, str]) -> Path | None:
    """Return the newest copy in the hub's cache, where the hub's client would look for it."""
    if hub_id is None:
        return None
    root = _cache(environ) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    return max(_folders(root), key=os.path.getmtime, default=None)


def _folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (path for path in root.iterdir() if path.is_dir())


def _cache(environ: Mapping[str, str]) -> Path:
    """Follow the variables of the hub's client."""
    if given := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given).expanduser()
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home).expanduser() / "hub"
