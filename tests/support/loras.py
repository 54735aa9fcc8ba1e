# SPDX-License-Identifier: Apache-2.0
"""Random LoRAs for the tiny models, in each of the spellings that are read."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from acestep_consumer.engine.testing import tiny_checkpoint

RANK: Final = 4
LAYERS: Final = tuple(
    f"layers.{number}.{part}"
    for number in range(2)
    for part in (
        *(f"{kind}_attn.to_{side}" for kind in ("self", "cross") for side in ("q", "k", "v", "out.0")),
        *(f"mlp.{side}_proj" for side in ("gate", "up", "down")),
    )
)
"""The linear layers of the tiny DiT's blocks, by diffusers' names."""

_ORIGINAL: Final = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "o_proj"}


def diffusers_key(layer: str, side: str) -> str:
    """Return the key that diffusers writes."""
    return f"transformer.{layer}.lora_{side}.weight"


def _original(layer: str) -> str:
    """Return ACE-Step's own name of a layer."""
    for new, old in _ORIGINAL.items():
        layer = layer.removesuffix(new) + old if layer.endswith(f".{new}") else layer
    return layer


def peft_key(layer: str, side: str) -> str:
    """Return the key that PEFT writes for a model with ACE-Step's own names, as ACE-Step's trainer does."""
    return f"base_model.model.{_original(layer)}.lora_{side}.weight"


def comfyui_key(layer: str, side: str) -> str:
    """Return the key of a LoRA for ComfyUI."""
    return f"diffusion_model.decoder.{_original(layer)}.lora_{side}.weight"


def kohya_key(layer: str, side: str) -> str:
    """Return the key that kohya's trainers write: underscores stand for dots."""
    name = f"lora_unet_decoder_{_original(layer)}".replace(".", "_")
    return f"{name}.lora_{'down' if side == 'A' else 'up'}.weight"


def down_up_key(layer: str, side: str) -> str:
    """Return the key of trainers that call the two matrices down and up."""
    return f"{layer}.lora_{'down' if side == 'A' else 'up'}.weight"


def random_lora(
    layers: Iterable[str] = LAYERS,
    *,
    seed: int = 0,
    key: Callable[[str, str], str] = diffusers_key,
    strength: float = 0.2,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA for the tiny DiT. It is loud: nobody can take the song for the one without."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: weight.shape for name, weight in _tiny_dit().named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        outputs, inputs = shapes[f"{layer}.weight"]
        tensors[key(layer, "A")] = strength * torch.randn(RANK, inputs, generator=generator)
        tensors[key(layer, "B")] = strength * torch.randn(outputs, RANK, generator=generator)
    return tensors


def write_lora(path: Path, tensors: dict[str, torch.Tensor] | None = None, **header: str) -> Path:
    """Write a LoRA file; a random one when none is given. ``header`` becomes the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(random_lora() if tensors is None else tensors, path, metadata=header or None)
    return path


def write_peft_lora(
    folder: Path, *, alpha: float, tensors: dict[str, torch.Tensor] | None = None, **config: Any
) -> Path:
    """Write a LoRA as PEFT does: weights, and beside them the configuration with their scale. Returns the weights."""
    path = write_lora(folder / "adapter_model.safetensors", tensors or random_lora(key=peft_key))
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "use_dora": False, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return path


def _tiny_dit() -> Any:
    with tiny_checkpoint._private_randomness(0):
        return tiny_checkpoint._transformer(turbo=True)
