# SPDX-License-Identifier: Apache-2.0
"""Checks the configured models' files before any is loaded: in milliseconds, and in the consumer process."""

import json
from pathlib import Path

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.renderer.original_layout import open_original
from acestep_consumer.engine.renderer.registry import CheckpointError, resolve
from acestep_consumer.engine.renderer.tensor_files import FileDamaged, read_header


def check_checkpoints(settings: EngineSettings) -> None:
    """Check every model that is on this disk. One that is named by its hub id is downloaded by the renderer.

    Raises:
        CheckpointError: a model is not found, a file is missing or was cut off, it is another model, or it holds code.
    """
    for name in settings.models:
        checkpoint = resolve(name, settings.checkpoint_dir)
        if checkpoint.folder is not None and checkpoint.original:
            open_original(checkpoint.folder, settings.checkpoint_dir)
        elif checkpoint.folder is not None:
            _check_diffusers(checkpoint.folder)


def _check_diffusers(folder: Path) -> None:
    """Check the weights of every component."""
    for path in folder.glob("*/*.safetensors.index.json"):
        try:
            named = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read: download the model again") from error
        if missing := sorted(name for name in named if not (path.parent / name).is_file()):
            raise CheckpointError(f"{path.parent} lacks {', '.join(missing)}: download the model again")
    for path in folder.glob("*/*.safetensors"):
        try:
            read_header(path)
        except FileDamaged as error:
            raise CheckpointError(f"{path} {error}") from error
