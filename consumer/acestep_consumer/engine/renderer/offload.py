# SPDX-License-Identifier: Apache-2.0
"""Offloading: models' modules wait in RAM, and one at a time is on the card.

diffusers has this too. There, a module leaves when the next one of a fixed chain is called, and ACE-Step does not call
its modules in the order of its chain: the condition encoder, 1.2 GB, would stay on the card beside the DiT.
"""

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module


class ModuleSwapper:
    """The modules that share the card. Not for several threads: a call takes the other modules' weights away."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._adopted: list[torch.nn.Module] = []
        self._present: torch.nn.Module | None = None

    def adopt(self, module: torch.nn.Module) -> None:
        """Send a module to RAM, to be brought back for each call. Models may have it in common."""
        if self._has(module):
            return
        module.to("cpu")
        add_hook_to_module(module, _SwapHook(self, self._device))
        self._adopted.append(module)

    def admit(self, module: torch.nn.Module) -> None:
        """Bring a module to the card, after the one that is there has left. One that was not adopted lives there."""
        if module is self._present:
            return
        self.clear()
        if self._has(module):
            module.to(self._device)
            self._present = module

    def clear(self) -> None:
        """Send the module on the card, if any, back to RAM."""
        if self._present is not None:
            self._present.to("cpu")
            self._present = None

    def _has(self, module: torch.nn.Module) -> bool:
        return any(module is each for each in self._adopted)


class _SwapHook(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Admits its module before each call. diffusers reads from ``execution_device`` where a call's tensors belong."""

    def __init__(self, card: ModuleSwapper, device: torch.device) -> None:
        self._card = card
        self.execution_device = device

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let the module in; its arguments are on the card already."""
        self._card.admit(module)
        return args, kwargs
