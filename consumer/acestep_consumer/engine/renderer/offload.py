# SPDX-License-Identifier: Apache-2.0
"""Model offloading: the modules are kept in RAM, and one at a time is on the device.

diffusers has this too. There, a module is moved out when the next one of a fixed sequence is called, and ACE-Step does
not call its modules in that order: the condition encoder, 1.2 GB, would stay on the device beside the DiT.
"""

from contextlib import suppress
from typing import Any

import structlog
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from acestep_consumer.engine.renderer.quantization import copied_parts, move, parts_of, replace_tensors, tensors_of

_ALIGNMENT = 256  # bytes, as an allocation has it

log = structlog.get_logger()


class ModuleSwapper:
    """The offloaded modules of one device. For one thread only: a call moves the other module's weights out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._registered: list[tuple[torch.nn.Module, _HostCopy]] = []
        self._loaded: _HostCopy | None = None

    def register(self, module: torch.nn.Module) -> None:
        """Move a module to RAM and load it for each call. Several models may share it, or have views of it."""
        if module in self:
            return
        copy = next((copy for each, copy in self._registered if _is_view_of(each, module)), None)
        if copy is None:
            move(module, "cpu")
            copy = _HostCopy(module, self._device)
        add_hook_to_module(module, _SwapHook(self, self._device))
        self._registered.append((module, copy))

    def __contains__(self, module: torch.nn.Module) -> bool:
        """Whether the module is registered."""
        return self._copy_of(module) is not None

    def load(self, module: torch.nn.Module) -> None:
        """Copy a module to the device, after the loaded one left it. An unregistered module is left where it is."""
        copy = self._copy_of(module)
        if copy is not None and copy is self._loaded:
            return
        self.unload()
        if copy is not None:
            try:
                copy.load()
            except Exception:
                copy.unload()  # what came to the device before its memory ran out
                raise
            self._loaded = copy

    def unload(self) -> None:
        """Free the device's memory of the loaded module, if any."""
        if self._loaded is not None:
            self._loaded.unload()
            self._loaded = None

    def _copy_of(self, module: torch.nn.Module) -> "_HostCopy | None":
        return next((copy for each, copy in self._registered if each is module), None)


class _HostCopy:
    """The tensors of one module in RAM, which stay there: nothing is copied back when the module leaves the device.

    The RAM is page-locked where that is possible, so that the device fetches the weights at the full speed of its bus,
    several times that of other memory.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        tensors = tensors_of(module)
        memory = _PageLocked(sum(_padded(part.nbytes) for tensor in tensors for part in parts_of(tensor)), device)
        self._tensors = [copied_parts(tensor, memory.copy) for tensor in tensors]
        self.unload()

    def load(self) -> None:
        """Copy the tensors to the device. The host does not wait for it: what the device does next comes after it."""
        tensors = iter(self._tensors)
        replace_tensors(self._module, lambda _: next(tensors).to(self._device, non_blocking=True))

    def unload(self) -> None:
        """Let the module have the tensors in RAM again."""
        tensors = iter(self._tensors)
        replace_tensors(self._module, lambda _: next(tensors))


class _PageLocked:
    """One piece of RAM that tensors are copied to one after the other, page-locked for a CUDA device.

    One piece, since torch would round each tensor's memory up to a power of two.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8)
        self._used = 0
        if device.type == "cuda" and size:
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
            fault = int(runtime.cudaHostRegister(self._memory.data_ptr(), size, 0))
            if fault:
                log.warning("offloaded models load more slowly: their RAM cannot be page-locked", cuda_error=fault)
                # CUDA tells it once more, to whoever launches the next kernel.
                with suppress(RuntimeError):
                    torch.zeros(1, device=device)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy in this memory, laid out as the tensor is: convolutions may have their channels innermost."""
        start, self._used = self._used, self._used + _padded(tensor.nbytes)
        place = self._memory[start : start + tensor.nbytes].view(tensor.dtype)
        # Those of a dense tensor; one with gaps or overlaps gets those of a copy.
        strides = torch.empty_like(tensor, device="meta").stride()
        return place.as_strided(tensor.shape, strides).copy_(tensor.detach())


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _is_view_of(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether one is a shallow copy of the other, which has the same weights: models that share a VAE have one each."""
    return all(vars(module)[name] is vars(other)[name] for name in ("_parameters", "_buffers", "_modules"))


class _SwapHook(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Loads its module before each call. diffusers reads the device of the call's tensors from ``execution_device``."""

    def __init__(self, swapper: ModuleSwapper, device: torch.device) -> None:
        self._swapper = swapper
        self.execution_device = device

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Load the module; its arguments are on the device already."""
        self._swapper.load(module)
        return args, kwargs
