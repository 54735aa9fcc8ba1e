# SPDX-License-Identifier: Apache-2.0
"""Model offloading: the modules are kept in RAM, and one at a time is on the device.

diffusers has this too. There, a module is moved out when the next one of a fixed sequence is called, and ACE-Step does
not call its modules in that order: the condition encoder, 1.2 GB, would stay on the device beside the DiT.
"""

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from acestep_consumer.engine.renderer.quantization import move


class ModuleSwapper:
    """The offloaded modules of one device. For one thread only: a call moves the other module's weights out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._registered: list[torch.nn.Module] = []
        self._loaded: torch.nn.Module | None = None

    def register(self, module: torch.nn.Module) -> None:
        """Move a module to RAM and load it for each call. Several models may share it."""
        if self._is_registered(module):
            return
        move(module, "cpu")
        add_hook_to_module(module, _SwapHook(self, self._device))
        self._registered.append(module)

    def load(self, module: torch.nn.Module) -> None:
        """Move a module to the device, after the loaded one to RAM. An unregistered module is left where it is."""
        if module is self._loaded:
            return
        self.unload()
        if self._is_registered(module):
            move(module, self._device)
            self._loaded = module

    def unload(self) -> None:
        """Move the loaded module, if any, back to RAM."""
        if self._loaded is not None:
            move(self._loaded, "cpu")
            self._loaded = None

    def _is_registered(self, module: torch.nn.Module) -> bool:
        return any(module is each for each in self._registered)


class _SwapHook(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Loads its module before each call. diffusers reads the device of the call's tensors from ``execution_device``."""

    def __init__(self, swapper: ModuleSwapper, device: torch.device) -> None:
        self._swapper = swapper
        self.execution_device = device

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Load the module; its arguments are on the device already."""
        self._swapper.load(module)
        return args, kwargs
