# SPDX-License-Identifier: Apache-2.0
"""Checkpoint loading: each model's weights once, and components that two models share once for both."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AceStepPipeline

from acestep_consumer.config.settings import EngineSettings, Quantization
from acestep_consumer.domain.job import LoadedModel
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.engine.renderer.checkpoints.original_layout import OriginalCheckpoint, open_original
from acestep_consumer.engine.renderer.checkpoints.original_weights import load_original
from acestep_consumer.engine.renderer.checkpoints.registry import Checkpoint, CheckpointError, resolve
from acestep_consumer.engine.renderer.device import DeviceReport, offload_for
from acestep_consumer.engine.renderer.lyrics.lyric_alignment import AlignmentHeads, heads_of
from acestep_consumer.engine.renderer.quantization import QuantizationUnavailable, move, quantize
from acestep_consumer.engine.renderer.quiet_imports import quietly

# ACE-Step trains the DiT; every model ships the same text encoder and the same VAE.
_SHAREABLE = ("text_encoder", "vae")


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """A loaded model: its description, and the diffusers pipeline that holds its weights.

    ``config``: of ACE-Step's own layout; empty for a model in diffusers' layout. ``alignment_heads``: as the config
    names them; None: it does not.
    """

    model: LoadedModel
    pipeline: Any
    config: Mapping[str, Any] = field(default_factory=dict)
    alignment_heads: AlignmentHeads | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """A model on this disk: in diffusers' layout, or in the original one."""

    name: str
    folder: Path
    original: OriginalCheckpoint | None

    def place_of(self, part: str) -> Path:
        """Return the folder, or the file, of a component that models may share."""
        return self.folder / part if self.original is None else self.original.place_of(part)


def load_models(
    settings: EngineSettings, device: DeviceReport, notify: Callable[[str], None]
) -> tuple[ModelHandle, ...]:
    """Load every model that the settings name, the primary first; ``notify`` gets a line for the log at each.

    Weights are read from safetensors only, and no code of a checkpoint is run. They are moved to ``device``, or stay in
    RAM for offloading. The hub is asked only for files that are not on disk, and never with ``HF_HUB_OFFLINE=1``.

    Raises:
        CheckpointError: a model is not found or cannot be read; if one is not found, none is loaded.
    """
    named = {each.name: each for each in (resolve(name, settings.checkpoint_dir) for name in settings.models)}
    found = [_find(checkpoint, settings.checkpoint_dir) for checkpoint in named.values()]
    offload = offload_for(device, settings).models
    cache = _ComponentCache(found)
    loader = _Loader(device, cache, notify, settings.quantization, keep_in_ram=offload)
    return tuple(loader.load(each) for each in found)


def _find(checkpoint: Checkpoint, checkpoint_dir: Path | None) -> _Found:
    """Return the model on this disk, fetched from the hub if need be."""
    try:
        with quietly():
            folder = checkpoint.folder or _download(checkpoint)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unloadable(checkpoint.name, checkpoint.hub_id, error) from error
    original = open_original(folder, checkpoint_dir) if checkpoint.original else None
    return _Found(checkpoint.name, folder, original)


@dataclass(frozen=True, slots=True)
class _Loader:
    """Loads models to a device, or to RAM with ``keep_in_ram``."""

    device: DeviceReport
    cache: "_ComponentCache"
    notify: Callable[[str], None]
    quantization: Quantization | None
    keep_in_ram: bool = field(kw_only=True)

    def load(self, found: _Found) -> ModelHandle:
        """Load one model. Raises ``CheckpointError``."""
        self.notify(f"loading {found.name} from {found.folder}")
        try:
            with quietly():
                keys = self.cache.keys(found)
                shared = self.cache.get(keys)
                pipeline = _read(found, self.device, shared)
        except (CheckpointError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise _unloadable(found.name, found.folder, error) from error
        for part in sorted(shared):
            self.notify(f"{found.name} shares its {part.replace('_', ' ')} with a model loaded before")
        self.cache.add(keys, pipeline)
        _prepare(pipeline)
        self._quantize(found.name, pipeline)
        if not self.keep_in_ram:
            pipeline.to(self.device.device)
        config = found.original.config if found.original else {}
        try:
            heads = heads_of(config or _transformer_config(found.folder))
        except ValueError as error:
            raise _unloadable(found.name, found.folder, error) from error
        return ModelHandle(_describe(found.name, pipeline, config), pipeline, config, heads)

    def _quantize(self, name: str, pipeline: Any) -> None:
        """Quantize the DiT, layer by layer, on the device: a processor takes many times as long."""
        if self.quantization is not None:
            self.notify(f"quantizing {name}: {self.quantization}")
        try:
            quantize(pipeline.transformer, self.quantization, self.device.device)
        except QuantizationUnavailable as error:
            raise CheckpointError(str(error)) from error
        if self.keep_in_ram:
            move(pipeline.transformer, "cpu")


def _transformer_config(folder: Path) -> Mapping[str, Any]:
    """Return the DiT's config in diffusers' layout, with the fields that diffusers does not know."""
    found: dict[str, Any] = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    return found


def _read(found: _Found, device: DeviceReport, shared: Mapping[str, Any]) -> AceStepPipeline:
    if found.original is not None:
        return load_original(found.original, device.dtype, shared)
    return AceStepPipeline.from_pretrained(
        found.folder, dtype=device.dtype, use_safetensors=True, local_files_only=True, **shared
    )


def _unloadable(name: str, place: Path | str | None, error: Exception) -> CheckpointError:
    return CheckpointError(f"model {name} cannot be loaded from {place}: {' '.join(str(error).split())}")


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


def _describe(name: str, pipeline: Any, config: Mapping[str, Any]) -> LoadedModel:
    return LoadedModel(
        name=name,
        variant=variant_of(name, {**pipeline.transformer.config, **config}),
        sample_rate=pipeline.sample_rate,
        latent_rate=pipeline.latents_per_second,
        wide=is_wide(pipeline.transformer.config),
        global_caption=bool(config.get("is_lego_sft")),
    )


def is_wide(config: Any) -> bool:
    """Whether a DiT with this config is an XL model: the condition encoder has a width of its own."""
    return config.get("encoder_hidden_size") not in (None, config["hidden_size"])


def variant_of(name: str, config: Mapping[str, Any]) -> Variant:
    """Return the family. The config marks turbo; SFT and base may have the same config and differ in name.

    A base model that was tuned further, such as acestep-v15-base-sft-fix-inst, does all tasks of a base model.
    """
    version = str(config.get("model_version") or "").lower()
    if config.get("is_turbo") or version == "turbo":
        return Variant.TURBO
    named_sft = "sft" in name.lower() and "base" not in name.lower()
    return Variant.SFT if ("sft" in version or named_sft) and not config.get("is_lego_sft") else Variant.BASE


class _ComponentCache:
    """Components loaded so far, by folder or by the hash of their files.

    The hash, since a finetuned VAE has the same shapes as the original. It is computed only where the models' folders
    differ.
    """

    def __init__(self, models: Sequence[_Found]) -> None:
        self._parts: dict[str, Any] = {}
        self._by_folder = {part: len({each.place_of(part).resolve() for each in models}) == 1 for part in _SHAREABLE}

    def keys(self, found: _Found) -> dict[str, str]:
        """Return a key of each shareable component. Hashing reads 1.5 GB for a real model: about two seconds."""
        return {part: f"{part} {self._key(part, found.place_of(part))}" for part in _SHAREABLE}

    def _key(self, part: str, folder: Path) -> str:
        return str(folder.resolve()) if self._by_folder[part] or folder.is_file() else _fingerprint(folder)

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
