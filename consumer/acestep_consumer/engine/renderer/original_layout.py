# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in ACE-Step's original layout: a DiT folder, with the VAE and the text encoder beside it. Loads nothing.

checkpoints/acestep-v15-turbo/  config.json, model.safetensors or shards with an index, silence_latent.pt
checkpoints/vae/                diffusers' AutoencoderOobleck
checkpoints/Qwen3-Embedding-0.6B/
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from acestep_consumer.engine.published_models import PUBLISHED, pull_command
from acestep_consumer.engine.renderer.registry import CheckpointError

WEIGHTS: Final = "model.safetensors"
SHARDS: Final = "model.safetensors.index.json"
SILENCE: Final = "silence_latent.pt"
VAE: Final = "vae"
TEXT_ENCODER: Final = "Qwen3-Embedding-0.6B"

_MODEL_TYPE: Final = "acestep"


@dataclass(frozen=True, slots=True)
class OriginalCheckpoint:
    """A model in the original layout.

    Attributes:
        config: of the DiT and all that was trained with it, as in config.json.
        weights: the files that hold its tensors.
        silence: the VAE's latents of silence, a tensor [1, channels, frames].
        vae: folder of the VAE.
        text_encoder: folder of the text encoder and its tokenizer.
    """

    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    silence: Path
    vae: Path
    text_encoder: Path


def open_original(folder: Path, checkpoint_dir: Path | None) -> OriginalCheckpoint:
    """Find the files of a model. VAE and text encoder are looked for beside it, then in ``checkpoint_dir``.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the folder holds another model.
    """
    places = tuple(dict.fromkeys((folder.parent, *_given(checkpoint_dir), folder.resolve().parent, folder)))
    return OriginalCheckpoint(
        config=_config(folder),
        weights=_weights(folder),
        silence=_file(folder / SILENCE),
        vae=_sibling(VAE, places),
        text_encoder=_sibling(TEXT_ENCODER, places),
    )


def _given(checkpoint_dir: Path | None) -> Iterator[Path]:
    if checkpoint_dir is not None:
        yield checkpoint_dir


def _config(folder: Path) -> Mapping[str, Any]:
    config = read_json(folder / "config.json")
    if (kind := config.get("model_type")) != _MODEL_TYPE:
        raise CheckpointError(
            f"{folder} holds a {kind or 'model of no type'}; ACE-Step 1.5 has model_type {_MODEL_TYPE}"
        )
    return config


def _weights(folder: Path) -> tuple[Path, ...]:
    """Return the weights' files: one, or the shards that the index lists."""
    if not (folder / SHARDS).is_file():
        return (_file(folder / WEIGHTS),)
    try:
        named = sorted(set(read_json(folder / SHARDS)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / SHARDS} cannot be read: it has no weight_map") from error
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, of {len(named)} files: {_again(folder)}")
    return tuple(folder / name for name in named)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} lacks {path.name}: {_again(path.parent)}")
    return path


def _again(folder: Path) -> str:
    """Return how to get what a folder lacks."""
    if folder.name not in PUBLISHED:
        return "download the model again"
    return f"download it with: {pull_command(folder.name, checkpoints=folder.parent)}"


def _sibling(name: str, places: tuple[Path, ...]) -> Path:
    for place in places:
        if (place / name / "config.json").is_file():
            return place / name
    looked = ", ".join(str(place / name) for place in places)
    raise CheckpointError(
        f"the {name} folder that every model in ACE-Step's layout needs is missing (looked for {looked}): "
        f"download it with: {pull_command(name, checkpoints=places[0])}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        CheckpointError: it is missing, or it is no JSON object.
    """
    try:
        content = json.loads(_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no JSON object")
    return content
