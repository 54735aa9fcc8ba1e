# SPDX-License-Identifier: Apache-2.0
"""Checkpoint loading: each model's weights once, and components that two models share once for both."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AceStepPipeline

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import LoadedModel
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.engine.renderer.device import DeviceReport, offload_for
from acestep_consumer.engine.renderer.quiet_imports import quietly
from acestep_consumer.engine.renderer.registry import Checkpoint, CheckpointError, resolve

# ACE-Step trains the DiT; every model ships the same text encoder and the same VAE.
_SHAREABLE = ("text_encoder", "vae")


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """A loaded model: its description, and the diffusers pipeline that holds its weights."""

    model: LoadedModel
    pipeline: Any


def load_models(
    settings: EngineSettings, device: DeviceReport, notify: Callable[[str], None]
) -> tuple[ModelHandle, ...]:
    """Load every model that the settings name, the primary first; ``notify`` gets a line for the log at each.

    Weights are read from safetensors only, and no code of a checkpoint is run. They are moved to ``device``, or stay in
    RAM for offloading. The hub is asked only for files that are not on disk, and never with ``HF_HUB_OFFLINE=1``.

    Raises:
        CheckpointError: a model is not found or cannot be read; if one is not found, none is loaded.
    """
    found = {each.name: each for each in (resolve(name, settings.checkpoint_dir) for name in settings.models)}
    offload = offload_for(device, settings).models
    cache = _ComponentCache(enabled=len(found) > 1)
    return tuple(_load(checkpoint, device, cache, notify, keep_in_ram=offload) for checkpoint in found.values())


def _load(
    checkpoint: Checkpoint,
    device: DeviceReport,
    cache: "_ComponentCache",
    notify: Callable[[str], None],
    *,
    keep_in_ram: bool,
) -> ModelHandle:
    notify(f"loading {checkpoint.name} from {checkpoint.folder or checkpoint.hub_id}")
    try:
        with quietly():
            folder = checkpoint.folder or _download(checkpoint)
            keys = cache.keys(folder)
            shared = cache.get(keys)
            pipeline = AceStepPipeline.from_pretrained(
                folder, dtype=device.dtype, use_safetensors=True, local_files_only=True, **shared
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        where = checkpoint.folder or checkpoint.hub_id
        raise CheckpointError(f"model {checkpoint.name} cannot be loaded from {where}: {error}") from error
    for part in sorted(shared):
        notify(f"{checkpoint.name} shares its {part.replace('_', ' ')} with a model loaded before")
    cache.add(keys, pipeline)
    _prepare(pipeline)
    if not keep_in_ram:
        pipeline.to(device.device)
    return ModelHandle(_describe(checkpoint.name, pipeline), pipeline)


def _download(checkpoint: Checkpoint) -> Path:
    """Return the hub's snapshot on this disk, fetched if need be."""
    return Path(AceStepPipeline.download(checkpoint.hub_id, use_safetensors=True))


def _prepare(pipeline: Any) -> None:
    """Prepare for inference, and compute the VAE's normalised weights once.

    ``weight_norm`` computes each weight again in every forward pass.
    """
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(requires_grad=False)
    for module in pipeline.vae.modules():
        if hasattr(module, "weight_g"):
            torch.nn.utils.remove_weight_norm(module)


def _describe(name: str, pipeline: Any) -> LoadedModel:
    return LoadedModel(
        name=name,
        variant=variant_of(name, pipeline.transformer.config),
        sample_rate=pipeline.sample_rate,
        latent_rate=pipeline.latents_per_second,
        wide=is_wide(pipeline.transformer.config),
    )


def is_wide(config: Any) -> bool:
    """Whether a DiT with this config is an XL model: the condition encoder has a width of its own."""
    return config.get("encoder_hidden_size") not in (None, config["hidden_size"])


def variant_of(name: str, config: Any) -> Variant:
    """Return the family. The DiT's config marks turbo; SFT and base have the same config and differ in name."""
    version = str(config.get("model_version") or "").lower()
    if config.get("is_turbo") or version == "turbo":
        return Variant.TURBO
    return Variant.SFT if "sft" in version or "sft" in name.lower() else Variant.BASE


class _ComponentCache:
    """Components loaded so far, by the hash of their files: a finetuned VAE has the same shapes as the original."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._parts: dict[str, Any] = {}

    def keys(self, folder: Path) -> dict[str, str]:
        """Return a fingerprint of each shareable component. Reads 1.5 GB for a real model: about two seconds."""
        if not self._enabled:
            return {}
        return {part: f"{part} {_fingerprint(folder / part)}" for part in _SHAREABLE}

    def get(self, keys: dict[str, str]) -> dict[str, Any]:
        return {part: self._parts[key] for part, key in keys.items() if key in self._parts}

    def add(self, keys: dict[str, str], pipeline: Any) -> None:
        self._parts.update({key: getattr(pipeline, part) for part, key in keys.items()})


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for line in _contents(folder):
        digest.update(line.encode())
    return digest.hexdigest()


def _contents(folder: Path) -> Iterator[str]:
    """Yield the hashes of the weights, and the config without fields on how it was written."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            yield f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    notes = {"transformers_version", "dtype", "torch_dtype"}
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in notes}
    yield json.dumps(kept, sort_keys=True)
