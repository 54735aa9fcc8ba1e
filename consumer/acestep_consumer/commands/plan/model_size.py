# SPDX-License-Identifier: Apache-2.0
"""Sizes of DiT models for ``plan``: of the files on this disk where there are some, else by name. Reads no tensor."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from acestep_consumer.engine.renderer.checkpoints.original_layout import COMFYUI_DIT
from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError, resolve
from acestep_consumer.engine.renderer.checkpoints.tensor_files import FileDamaged, TensorInfo, read_header
from acestep_consumer.policy.benchmarks import DIT_2B, DIT_SIZES, DIT_XL, DitSize, is_same_size

_INPUTS: Final = ("proj_in.1.weight", "proj_in_conv.weight")
_LAYER: Final = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class SizedDit:
    """A DiT's size, whether it is a turbo model, and whether its files were read (else both are by its name)."""

    size: DitSize
    turbo: bool
    on_disk: bool


def size_of_dit(named: str, checkpoint_dir: Path | None) -> SizedDit:
    """Return the size of a DiT: name, folder, file or hub id."""
    base = named.rstrip("/").rpartition("/")[2].lower()
    by_name = SizedDit(DIT_XL if "xl" in base.split("-") else DIT_2B, "turbo" in base, on_disk=False)
    try:
        checkpoint = resolve(named, checkpoint_dir)
        if checkpoint.folder is None:
            return by_name
        part = checkpoint.folder if checkpoint.original else checkpoint.folder / "transformer"
        size = _dit_size(_tensors([part] if part.is_file() else part.glob("*.safetensors")))
    except (CheckpointError, FileDamaged, KeyError, ValueError):
        return by_name
    return SizedDit(size, bool(_config(part).get("is_turbo", by_name.turbo)), on_disk=True)


def _dit_size(tensors: Mapping[str, TensorInfo]) -> DitSize:
    """Return the size of the DiT in a file that may hold other parts too."""
    tensors = {name.removeprefix(COMFYUI_DIT): info for name, info in tensors.items()}
    own = {name.removeprefix("decoder."): info for name, info in tensors.items() if name.startswith("decoder.")}
    tensors = own or tensors
    parameters = _parameters(tensors.values())
    if known := next((size for size in DIT_SIZES if is_same_size(parameters, size.parameters)), None):
        return known
    hidden = next(tensors[name].shape[0] for name in _INPUTS if name in tensors)
    return DitSize(f"{parameters / 1e9:.2g}B", parameters, _layers(tensors), hidden)


def _tensors(files: Iterable[Path]) -> dict[str, TensorInfo]:
    return {name: info for path in files for name, info in read_header(path).tensors.items()}


def _parameters(tensors: Iterable[TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors)


def _layers(names: Iterable[str]) -> int:
    return 1 + max(int(found[1]) for name in names if (found := _LAYER.search(name)))


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config
