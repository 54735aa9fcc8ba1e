# SPDX-License-Identifier: Apache-2.0
"""LoRA merging: a copy of the DiT with LoRAs added to its weights, as fast as the DiT without.

Each LoRA's change is computed from the DiT's own weights, and the changes are added up in the request's order. So the
order changes nothing but the rounding, and a DoRA, which rescales the weights that it changes, is the same one beside
others. ``scale`` blends: 0 is the DiT without, 1 the LoRA as it was trained.

The adapted DiT is a module of its own, and shares with its base the memory of every weight that the LoRA does not
change. Sums are computed in float32 and rounded once: in bfloat16 much of a LoRA would be lost to rounding. Of a DiT in
int8, the changed weights are in bfloat16: in steps of an eighth bit a LoRA would be lost altogether.
"""

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import nn

from acestep_consumer.domain.errors import InputUnreadable
from acestep_consumer.engine.renderer.lora_file import AnyDelta, KroneckerDelta, read_lora
from acestep_consumer.engine.renderer.quantization import dequantized
from acestep_consumer.inputs.loras import PEFT_CONFIG, PEFT_WEIGHTS

# accelerate, diffusers and torch set these on a module to change how it is called; they are bound to that module.
_MODULE_HOOKS: Final = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")
_ANOTHER: Final = "use one that was trained for it, or name the LoRA's own model in the field model"


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA with its scale. Equal when content and scale are, whatever the path.

    ``alpha``: from the request, for a file that does not say it.
    """

    path: Path = field(compare=False)
    scale: float
    digest: str
    alpha: float | None = None

    @classmethod
    def at(cls, path: Path, scale: float, alpha: float | None = None) -> Self:
        """Identify the LoRA at ``path``. The file is read once for as long as it does not change, about 1 GB a second.

        Raises:
            InputUnreadable: the file cannot be read.
        """
        try:
            files = [_LoraFile.at(path)]
            if path.name == PEFT_WEIGHTS and (config := path.with_name(PEFT_CONFIG)).is_file():
                files.append(_LoraFile.at(config))
            return cls(path, scale, "-".join(map(_digest, files)), alpha)
        except OSError as error:
            raise InputUnreadable(f"the LoRA's file cannot be read ({type(error).__name__})") from error


Loras = tuple[Lora, ...]
"""The LoRAs of one request, in its order."""


@dataclass(frozen=True, slots=True)
class _LoraFile:
    """A file, identified without its path: each job that uses a fetched LoRA has a hard link of its own."""

    path: Path = field(compare=False)
    identity: tuple[int, ...]

    @classmethod
    def at(cls, path: Path) -> Self:
        found = path.stat()
        return cls(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=64)
def _digest(file: _LoraFile) -> str:
    with file.path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class _Adapted:
    """An adapted DiT, its base, and the bytes of the weights that it does not share with it."""

    base: Any
    dit: Any
    bytes: int


class AdaptedModelCache:
    """An LRU cache of adapted DiTs. Thread-safe.

    Args:
        max_models: DiTs to keep. Each takes as much memory as the weights that its LoRA changes.
    """

    def __init__(self, max_models: int = 1) -> None:
        if max_models < 1:
            raise ValueError("max_models must be 1 or more")
        self._max_models = max_models
        self._busy = threading.Lock()
        # The entry keeps its base alive, so that no other object can come to have the base's id.
        self._entries: OrderedDict[tuple[int, torch.device, Loras], _Adapted] = OrderedDict()

    def adapted(self, dit: Any, *loras: Lora) -> Any:
        """Return ``dit`` with the LoRAs in its weights, from the cache if it is there.

        ``dit`` itself is not changed. The adapted one is where ``dit`` is now, in its precision and without its hooks:
        after moving ``dit`` between RAM and device, call this again.

        Raises:
            InputUnreadable: a file is not a LoRA, was made for another model, or is too strong for its numbers.
            torch.OutOfMemoryError: the device has no memory for the changed weights; the cache is empty then.
        """
        with self._busy:
            key = (id(dit), next(dit.parameters()).device, loras)
            if key not in self._entries:
                changes = [
                    (delta, lora.scale) for lora in loras for delta in _fitting(dit, read_lora(lora.path, lora.alpha))
                ]
                self._evict()
                self._entries[key] = _adapt(dit, changes)
            self._entries.move_to_end(key)
            return self._entries[key].dit

    def clear(self) -> None:
        """Drop all entries. Their memory is freed once no batch uses them any more."""
        with self._busy:
            self._entries.clear()

    @property
    def bytes(self) -> int:
        """Device memory of the changed weights of all entries."""
        with self._busy:
            return sum(entry.bytes for entry in self._entries.values())

    def _evict(self) -> None:
        """Make room before the next one is made: two at a time may not fit on the device."""
        while len(self._entries) >= self._max_models:
            self._entries.popitem(last=False)


def _fitting(dit: nn.Module, deltas: tuple[AnyDelta, ...]) -> tuple[AnyDelta, ...]:
    """Return ``deltas`` if each one fits its layer."""
    modules = dict(dit.named_modules())
    for delta in deltas:
        module = modules.get(delta.layer)
        if not isinstance(module, (nn.Linear, nn.Conv1d) if isinstance(delta, KroneckerDelta) else nn.Linear):
            raise InputUnreadable(
                f"the LoRA does not fit this model, which has no linear layer {delta.layer[:100]!a}; {_ANOTHER}"
            )
        expected, found = tuple(module.weight.flatten(1).shape), delta.shape
        if expected != found:
            raise InputUnreadable(
                f"the LoRA does not fit this model: {delta.layer} has weights of {expected[0]} x {expected[1]}, and "
                f"the LoRA's are {found[0]} x {found[1]}; {_ANOTHER}"
            )
        if delta.magnitude is not None and _lengths_of(delta.magnitude, expected) is None:
            raise InputUnreadable(
                f"the LoRA does not fit this model: the magnitude of {delta.layer} has another length"
            )
    return deltas


# Inference tensors cannot be moved or compiled outside of inference mode, and callers may be in it.
@torch.inference_mode(mode=False)
@torch.no_grad()
def _adapt(dit: nn.Module, changes: Iterable[tuple[AnyDelta, float]]) -> _Adapted:
    """Return a copy with the changes. Each is a layer's change and its scale."""
    by_layer: dict[str, list[tuple[AnyDelta, float]]] = {}
    for delta, scale in changes:
        by_layer.setdefault(delta.layer, []).append((delta, scale))
    adapted = _copy_modules(dit)
    changed_bytes = 0
    for layer, some in by_layer.items():
        module = adapted.get_submodule(layer)
        weight = _merged(module.weight, some)
        module.weight = nn.Parameter(weight, requires_grad=False)
        changed_bytes += weight.nbytes
    return _Adapted(dit, adapted, changed_bytes)


def _merged(weight: Any, changes: Iterable[tuple[AnyDelta, float]]) -> torch.Tensor:
    base = dequantized(weight).flatten(1)
    total = base
    for delta, scale in changes:
        if delta.magnitude is None:
            total = delta.added_to(total, scale)
        else:
            total = total + scale * (_rescaled(delta.added_to(base, 1), delta.magnitude) - base)
        if not total.to(weight.dtype).isfinite().all():
            raise InputUnreadable(
                f"the LoRA is too strong: {delta.layer} overflows; lower lora.scale or the LoRA's alpha"
            )
    return total.to(weight.dtype).reshape(tuple(weight.shape))


def _rescaled(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Return a matrix with rows, or columns, of the lengths that a DoRA has learned."""
    lengths = _lengths_of(magnitude.to(weight.device).float(), tuple(weight.shape))
    if lengths is None:
        raise ValueError("a magnitude that does not fit")
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=1 if len(lengths) > 1 else 0, keepdim=True)
    return weight * (lengths / norms)


def _lengths_of(magnitude: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return the lengths as a column, [outputs, 1], or as a row, [1, inputs]; None: they do not fit."""
    outputs, inputs = shape
    if magnitude.numel() == outputs and magnitude.shape[0] == outputs:
        return magnitude.reshape(outputs, 1)
    return magnitude.reshape(1, inputs) if magnitude.numel() == inputs and magnitude.shape[0] == 1 else None


def _copy_modules(module: nn.Module) -> nn.Module:
    """Copy the tree of modules, but neither its memory nor its hooks."""
    adapted = copy.copy(module)
    for name in _MODULE_HOOKS:
        vars(adapted).pop(name, None)
    for name, hooks in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            setattr(adapted, name, type(hooks)())
    # New parameters over the same memory: moving one model must not move the other.
    adapted._parameters = {name: _alias(weight) for name, weight in module._parameters.items()}  # noqa: SLF001 - as torch's DataParallel
    adapted._buffers = dict(module._buffers)  # noqa: SLF001 - as above
    children = module._modules.items()  # noqa: SLF001 - as above
    adapted._modules = {name: child if child is None else _copy_modules(child) for name, child in children}  # noqa: SLF001 - as above
    return adapted


def _alias(weight: nn.Parameter | None) -> nn.Parameter | None:
    return None if weight is None else nn.Parameter(weight.detach(), requires_grad=False)
