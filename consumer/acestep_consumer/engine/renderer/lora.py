# SPDX-License-Identifier: Apache-2.0
"""A DiT with a LoRA in its weights. It costs a song no more than the DiT without, and it costs that one nothing.

The adapted DiT is a model of its own for whoever calls it, and shares with its base the memory of every weight that the
LoRA leaves alone. Sums are made in float32 and rounded once: in bfloat16 much of a LoRA would be lost to rounding.
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

from acestep_consumer.domain.errors import InputUnreadable, RenderFailed
from acestep_consumer.engine.renderer.lora_file import Delta, read_lora
from acestep_consumer.inputs.loras import PEFT_CONFIG, PEFT_WEIGHTS

# accelerate, diffusers and torch set these on a module to have it called in another way, bound to that very module.
_BOUND: Final = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA as one request wants it. Equal when content and scale are, wherever the file lies."""

    path: Path = field(compare=False)
    scale: float
    digest: str

    @classmethod
    def at(cls, path: Path, scale: float) -> Self:
        """Name the LoRA at ``path``. Its bytes are read once as long as the file stays the same, about 1 GB a second.

        Raises:
            InputUnreadable: the file is gone.
        """
        try:
            files = [_LoraFile.at(path)]
            if path.name == PEFT_WEIGHTS and (config := path.with_name(PEFT_CONFIG)).is_file():
                files.append(_LoraFile.at(config))
            return cls(path, scale, "-".join(map(_digest, files)))
        except OSError as error:
            raise InputUnreadable(f"the LoRA's file cannot be read ({type(error).__name__})") from error


@dataclass(frozen=True, slots=True)
class _LoraFile:
    """A file, whatever its name: each job that uses a fetched LoRA has a hard link of its own."""

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
    """An adapted DiT, its base, and the bytes of the weights that it does not share."""

    base: Any
    dit: Any
    bytes: int


class AdaptedModelCache:
    """The adapted DiTs at hand; the least recently used one leaves. For any number of threads.

    Args:
        most: how many to keep. Each takes as much memory as the weights that its LoRA changes.
    """

    def __init__(self, most: int = 1) -> None:
        if most < 1:
            raise ValueError("a shelf holds one adapted DiT at least")
        self._most = most
        self._busy = threading.Lock()
        # The entry keeps its base alive, so that no other object can come to have the base's id.
        self._shelf: OrderedDict[tuple[int, torch.device, Lora], _Adapted] = OrderedDict()

    def adapted(self, dit: Any, lora: Lora) -> Any:
        """Return ``dit`` with the LoRA in its weights: the same object for the same question while it is on the shelf.

        ``dit`` stays as it is. The adapted one is where ``dit`` is now, in its precision, and has none of its hooks:
        who moves ``dit`` between RAM and card has to move this one as well, or ask again after moving.

        Raises:
            InputUnreadable: the file is no LoRA.
            RenderFailed: it was made for another model.
            torch.OutOfMemoryError: the device has no room for the weights that change; the shelf is empty then.
        """
        with self._busy:
            key = (id(dit), next(dit.parameters()).device, lora)
            if key not in self._shelf:
                deltas = _fitting(dit, read_lora(lora.path))
                self._make_room()
                self._shelf[key] = _adapt(dit, deltas, lora.scale)
            self._shelf.move_to_end(key)
            return self._shelf[key].dit

    def clear(self) -> None:
        """Let go of all. Memory is free once nobody sings with them any more."""
        with self._busy:
            self._shelf.clear()

    @property
    def bytes(self) -> int:
        """Memory of the weights that are on the shelf alone."""
        with self._busy:
            return sum(entry.bytes for entry in self._shelf.values())

    def _make_room(self) -> None:
        """Before the next one is made: two at a time may be more than the card holds."""
        while len(self._shelf) >= self._most:
            self._shelf.popitem(last=False)


def _fitting(dit: nn.Module, deltas: tuple[Delta, ...]) -> tuple[Delta, ...]:
    """Return ``deltas`` if each one fits its layer."""
    modules = dict(dit.named_modules())
    for delta in deltas:
        module = modules.get(delta.layer)
        if not isinstance(module, nn.Linear):
            raise RenderFailed(f"the LoRA does not fit this model, which has no linear layer {delta.layer[:100]!a}")
        wanted, given = tuple(module.weight.shape), (len(delta.up), delta.down.shape[1])
        if wanted != given:
            raise RenderFailed(
                f"the LoRA does not fit this model: {delta.layer} has weights of {wanted[0]} x {wanted[1]}, and the "
                f"LoRA's are {given[0]} x {given[1]}"
            )
    return deltas


# Inference tensors could not be moved or compiled outside of inference mode, and callers may be in it.
@torch.inference_mode(mode=False)
@torch.no_grad()
def _adapt(dit: nn.Module, deltas: Iterable[Delta], scale: float) -> _Adapted:
    twin = _twin(dit)
    own = 0
    for delta in deltas:
        linear = twin.get_submodule(delta.layer)
        weight = _merged(linear.weight, delta, scale)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        own += weight.nbytes
    return _Adapted(dit, twin, own)


def _merged(weight: Any, delta: Delta, scale: float) -> torch.Tensor:
    up, down = (side.to(weight.device).float() for side in (delta.up, delta.down))
    total: torch.Tensor = torch.addmm(weight.float(), up, down, alpha=delta.factor * scale)
    return total.to(weight.dtype)


def _twin(module: nn.Module) -> nn.Module:
    """Copy the tree of modules and none of its memory. What is hooked to the original stays with the original."""
    twin = copy.copy(module)
    for name in _BOUND:
        vars(twin).pop(name, None)
    for name, hooks in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            setattr(twin, name, type(hooks)())
    # Parameters of its own over the same memory: moving one model must not move the other.
    twin._parameters = {name: _alias(weight) for name, weight in module._parameters.items()}  # noqa: SLF001 - as torch's DataParallel
    twin._buffers = dict(module._buffers)  # noqa: SLF001 - as above
    twin._modules = {name: child if child is None else _twin(child) for name, child in module._modules.items()}  # noqa: SLF001 - as above
    return twin


def _alias(weight: nn.Parameter | None) -> nn.Parameter | None:
    return None if weight is None else nn.Parameter(weight.detach(), requires_grad=False)
