# SPDX-License-Identifier: Apache-2.0
"""Checks the configured models' files before any is loaded: in milliseconds, and in the consumer process."""

from contextlib import suppress
from importlib.util import find_spec

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.renderer.checkpoints.component_files import faults_of_pipeline
from acestep_consumer.engine.renderer.checkpoints.original_layout import open_original
from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError, resolve
from acestep_consumer.engine.torchao_checkpoints import INSTALL, quantized_by_torchao


def check_checkpoints(settings: EngineSettings) -> None:
    """Check every model that is on this disk. One that is named by its hub id is downloaded by the renderer.

    Raises:
        CheckpointError: a model is not found, a file is missing or was cut off, it is another model, or it holds code.
    """
    for name in settings.models:
        try:
            _check(name, settings)
        except OSError as error:
            raise CheckpointError(f"model {name} cannot be read: {error.strerror or error}: check its path") from error


def _check(name: str, settings: EngineSettings) -> None:
    checkpoint = resolve(name, settings.checkpoint_dir)
    if checkpoint.folder is not None and checkpoint.original:
        open_original(checkpoint.folder, settings.checkpoint_dir)
    elif checkpoint.folder is not None and (faults := "; ".join(faults_of_pipeline(checkpoint.folder))):
        raise CheckpointError(f"{checkpoint.folder} is incomplete: {faults}: download the model again")
    elif checkpoint.folder is not None and quantized_by_torchao(checkpoint.folder) and find_spec("torchao") is None:
        raise CheckpointError(f"{checkpoint.folder} is quantized by torchao, which is missing: {INSTALL}")


def uses_torchao(settings: EngineSettings) -> bool:
    """Whether weights are to be quantized, or those of a model on this disk already are."""
    if settings.quantization is not None:
        return True
    for name in settings.models:
        with suppress(CheckpointError, OSError):  # loading says it
            folder = resolve(name, settings.checkpoint_dir).folder
            if folder is not None and quantized_by_torchao(folder):
                return True
    return False
