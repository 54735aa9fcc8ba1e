# SPDX-License-Identifier: Apache-2.0
"""Device selection: which device renders, its memory, and what is offloaded from it."""

import platform
from dataclasses import dataclass

import torch

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.policy.tiers import OFFLOADABLE, offloads

_GIB = 2**30
# CUDA stands for ROCm too: torch calls both by that name.
_BY_PREFERENCE = ("cuda", "xpu", "mps", "cpu")


class DeviceError(Exception):
    """``ACESTEP_DEVICE`` names a device that torch does not see here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """A device as torch names it (``cuda:0``), its product name, and its memory in GiB (0: no GPU)."""

    device: str
    name: str
    vram_gb: float

    @property
    def kind(self) -> str:
        """``cuda``, ``xpu``, ``mps`` or ``cpu``."""
        return torch.device(self.device).type

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights.

        They were trained in bfloat16. Metal and older CPUs are slow at it or lack it, and float16 overflows in these
        models, so there it is float32.
        """
        return torch.bfloat16 if self.kind in ("cuda", "xpu") else torch.float32


@dataclass(frozen=True, slots=True)
class Offload:
    """The modules that are kept in RAM between uses: all ``models``, and among them the ``dit``."""

    models: bool = False
    dit: bool = False


def inspect(settings: EngineSettings) -> DeviceReport:
    """Choose the device and inspect it. ``MAX_CUDA_VRAM`` replaces the size that was found, even without a GPU.

    Raises:
        DeviceError: the device that was asked for is not there.
    """
    device = _choose(settings.device.strip().lower())
    name, memory = _look_at(device)
    vram_gb = settings.max_vram_gb if settings.max_vram_gb is not None else memory / _GIB
    return DeviceReport(device=str(device), name=name, vram_gb=vram_gb)


def offload_for(report: DeviceReport, settings: EngineSettings) -> Offload:
    """Decide what is offloaded."""
    models = offloads(report.kind, report.vram_gb, settings.offload)
    return Offload(models=models, dit=models and settings.offload_dit is not False)


def _choose(asked: str) -> torch.device:
    if asked == "auto":
        return _numbered(next(kind for kind in _BY_PREFERENCE if _count(kind)))
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise DeviceError(f"ACESTEP_DEVICE = {asked}: must be auto, cuda, cuda:1, xpu, mps or cpu") from error
    if (device.index or 0) >= _count(device.type):
        seen = ", ".join(f"{kind} ({_count(kind)})" for kind in _BY_PREFERENCE if _count(kind))
        raise DeviceError(f"ACESTEP_DEVICE = {asked}: torch {torch.__version__} does not see it; it sees {seen}")
    return _numbered(device.type, device.index)


def _numbered(kind: str, index: int | None = None) -> torch.device:
    """Return the device with its index, so that every thread uses the same one."""
    return torch.device(kind, index or 0) if kind in OFFLOADABLE else torch.device(kind)


def _count(kind: str) -> int:
    """Return how many devices of this kind torch sees."""
    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    if kind not in OFFLOADABLE:
        return 0
    module = getattr(torch, kind)
    return int(module.device_count()) if module.is_available() else 0


def _look_at(device: torch.device) -> tuple[str, int]:
    """Return the product name and the bytes of memory."""
    if device.type in OFFLOADABLE:
        card = getattr(torch, device.type).get_device_properties(device)
        return str(card.name), int(card.total_memory)
    if device.type == "mps":
        return "Apple GPU", int(torch.mps.recommended_max_memory())
    return platform.processor() or platform.machine() or "CPU", 0
