# SPDX-License-Identifier: Apache-2.0
"""Model registry: finds the checkpoint of a model by its name, in folders or on the hub. Loads nothing."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from acestep_consumer.engine.hub_cache import HUB_ID, model_folders, snapshot
from acestep_consumer.engine.published_models import MAIN_REPOSITORY, PUBLISHED, is_dit, pull_command
from acestep_consumer.engine.renderer.checkpoints.tensor_files import SUFFIXES

# Published in diffusers' layout too. A worker takes them from the hub's cache, and downloads them only by their id.
HUB: Final = MappingProxyType(
    {
        "acestep-v15-xl-turbo": "ACE-Step/acestep-v15-xl-turbo-diffusers",
        "acestep-v15-xl-base": "ACE-Step/acestep-v15-xl-base-diffusers",
    }
)
INDEX: Final = "model_index.json"
PIPELINE: Final = "AceStepPipeline"

_NAMES: Final = MappingProxyType(
    {model.repository: name for name, model in PUBLISHED.items() if model.repository != MAIN_REPOSITORY}
    | {hub_id: name for name, hub_id in HUB.items()}
)
"""Names of published models by the repositories that hold one alone."""
SILENCE: Final = "silence_latent.pt"
_ORIGINAL_FILES = ("model.safetensors", "model.safetensors.index.json", SILENCE)


class CheckpointError(Exception):
    """A model of the settings cannot be loaded; the text says why and what to do."""


class ModelNotFound(CheckpointError):
    """A model is neither on this disk nor known to be on the hub."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The location of a model: in ``folder``, or else on the hub as ``hub_id``. Requests refer to it by ``name``.

    ``original``: the folder has ACE-Step's original layout, or it is a file of ComfyUI's or a GGUF file; otherwise it
    has diffusers' layout.
    """

    name: str
    folder: Path | None = None
    hub_id: str | None = None
    original: bool = False


def resolve(named: str, checkpoint_dir: Path | None, environ: Mapping[str, str] | None = None) -> Checkpoint:
    """Find the checkpoint: a folder or file of that path, then one of that name in ``checkpoint_dir``, then the hub.

    A published model is downloaded by ``models pull``, and not from here; of the hub's cache, what is there is taken.

    Args:
        named: name, folder, file or hub id.
        checkpoint_dir: folder of models; None: there is none.
        environ: names the cache folder of the Hugging Face client; None: this process's.

    Raises:
        ModelNotFound: it is in none of them.
        CheckpointError: the folder is no checkpoint.
    """
    for folder in model_folders(named, checkpoint_dir):
        if folder.is_dir():
            return Checkpoint(folder.resolve().name, folder=folder, original=_is_original(folder))
        if folder.is_file() and folder.suffix in SUFFIXES:
            return Checkpoint(folder.stem, folder=folder, original=True)
    hub_id = HUB.get(named, named)
    if not HUB_ID.fullmatch(hub_id):
        raise ModelNotFound(_not_found(named, checkpoint_dir))
    name = _NAMES.get(hub_id, hub_id.rpartition("/")[2])
    cached = snapshot(hub_id, os.environ if environ is None else environ)
    if cached is not None and (cached / INDEX).is_file():
        return Checkpoint(name, folder=cached, original=_is_original(cached))
    if named in HUB or (hub_id in _NAMES and hub_id not in HUB.values()):
        raise ModelNotFound(_not_found(name, checkpoint_dir))
    return Checkpoint(name, hub_id=hub_id)


def _is_original(folder: Path) -> bool:
    """Tell the two layouts apart, and refuse a folder that has neither.

    Raises:
        CheckpointError: it is no checkpoint, or one of another kind.
    """
    index = folder / INDEX
    if not index.is_file():
        if any((folder / name).is_file() for name in _ORIGINAL_FILES):
            return True
        rest = f". Download it: {pull_command(folder.name, checkpoints=folder.parent)}" if is_dit(folder.name) else ""
        if there := ", ".join(_models_in(folder)):
            rest = f". It holds {there}: name one of them, and the folder with ACESTEP_CHECKPOINT_DIR"
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has neither {_ORIGINAL_FILES[0]} (ACE-Step's layout) "
            f"nor {INDEX} (diffusers' layout){rest}"
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}") from error
    if kind != PIPELINE:
        raise CheckpointError(f"{folder} holds a {kind}; ACE-Step 1.5 is an {PIPELINE}")
    return False


def _not_found(named: str, checkpoint_dir: Path | None) -> str:
    places = "; ".join(str(folder) for folder in model_folders(named, checkpoint_dir))
    unset = _unusable(checkpoint_dir)
    looked = f"model {named} was not found. Looked for a folder: {places}{unset}."
    if checkpoint_dir and _is_model(checkpoint_dir):
        return f"{looked} {checkpoint_dir} is a model itself: set ACESTEP_CHECKPOINT_DIR to {checkpoint_dir.parent}"
    if there := ", ".join(_models_in(checkpoint_dir)):
        looked += f" {checkpoint_dir} holds {there}: choose with ACESTEP_CONFIG_PATH or --model."
    if is_dit(named) and not (checkpoint_dir and checkpoint_dir.is_file()):
        return f"{looked} Download it: {pull_command(named, checkpoints=checkpoint_dir)}"
    known = ", ".join(sorted({*HUB, *filter(is_dit, PUBLISHED)}))
    return f"{looked} Known names: {known}. A hub id (organisation/model) or a folder is accepted as well."


def _unusable(checkpoint_dir: Path | None) -> str:
    """Say why nothing can be in the folder of models; blank where something can."""
    if checkpoint_dir is None:
        return " (ACESTEP_CHECKPOINT_DIR is not set)"
    if checkpoint_dir.is_file():
        return (
            f" ({checkpoint_dir} is a file: ACESTEP_CHECKPOINT_DIR names a folder, ACESTEP_CONFIG_PATH a model's file)"
        )
    return "" if checkpoint_dir.is_dir() else f" ({checkpoint_dir} does not exist: correct ACESTEP_CHECKPOINT_DIR)"


def _models_in(checkpoint_dir: Path | None) -> Iterator[str]:
    """Yield the names of the DiT models in a folder."""
    for folder in sorted(checkpoint_dir.iterdir()) if checkpoint_dir and checkpoint_dir.is_dir() else ():
        if _is_model(folder):
            yield folder.name


def _is_model(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / SILENCE).is_file()
