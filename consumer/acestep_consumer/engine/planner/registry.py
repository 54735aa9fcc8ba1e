# SPDX-License-Identifier: Apache-2.0
"""Language model registry: finds a model by its name, in folders or on the hub. Loads nothing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.hub_cache import is_offline, snapshot
from acestep_consumer.engine.published_models import MAIN_REPOSITORY, PUBLISHED, ModelKind, pull_command
from acestep_consumer.policy.lm_choice import LmRequest
from acestep_consumer.policy.tiers import LMS

HUB: Final = MappingProxyType(
    {
        model.name: model.repository
        for model in PUBLISHED.values()
        if model.kind is ModelKind.LM and model.repository != MAIN_REPOSITORY
    }
)
"""Language models with a repository of their own, which the first start downloads."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class LmNotFound(Exception):
    """There is no language model of that name; the message says where it was looked for and what to do."""


@dataclass(frozen=True, slots=True)
class LmLocation:
    """The location of a language model: in ``folder``, or else on the hub as ``hub_id``. One of them is None."""

    folder: Path | None = None
    hub_id: str | None = None


def resolve(model: str, checkpoint_dir: Path | None) -> LmLocation:
    """Find the model: a folder of that path, then one of that name in ``checkpoint_dir``, then the hub.

    Raises:
        LmNotFound: it is in none of them.
    """
    for folder in _folders(model, checkpoint_dir):
        if (folder / "config.json").is_file():
            return LmLocation(folder=folder.resolve())
    hub_id = HUB.get(model, model)
    if _HUB_ID.fullmatch(hub_id):
        return LmLocation(hub_id=hub_id)
    where = f"{checkpoint_dir / model}" if checkpoint_dir else "a folder of that name (ACESTEP_CHECKPOINT_DIR is unset)"
    pull = f", or download it: {pull_command(model, checkpoints=checkpoint_dir)}" if model in PUBLISHED else ""
    raise LmNotFound(f"language model {model} is not found: looked for {where}; set ACESTEP_LM_MODEL_PATH{pull}")


def lm_request(settings: EngineSettings, environ: Mapping[str, str]) -> LmRequest:
    """Return the request for a language model on this machine: the settings, and the models that can be had.

    Args:
        settings: the engine's.
        environ: names the cache folder of the Hugging Face client.
    """
    found = (name for name in LMS if _is_on_disk(name, settings.checkpoint_dir, environ))
    return LmRequest(
        init=settings.init_llm,
        model=settings.lm_model_path,
        backend=settings.lm_backend,
        on_disk=frozenset(found),
        on_hub=frozenset() if is_offline(environ) else frozenset(HUB),
    )


def _is_on_disk(name: str, checkpoint_dir: Path | None, environ: Mapping[str, str]) -> bool:
    folders = _folders(name, checkpoint_dir)
    cached = snapshot(HUB[name], environ) if name in HUB else None
    return any((folder / "config.json").is_file() and any(folder.glob("*.safetensors")) for folder in folders) or (
        cached is not None and any(cached.glob("*.safetensors"))
    )


def _folders(model: str, checkpoint_dir: Path | None) -> tuple[Path, ...]:
    given = Path(model).expanduser()
    return (given,) if checkpoint_dir is None else (given, checkpoint_dir / model)
