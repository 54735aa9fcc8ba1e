# SPDX-License-Identifier: Apache-2.0
"""Detects this machine's GPU: with nvidia-smi, or else with torch in a subprocess."""

import csv
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ValidationError

from acestep_consumer.commands.doctor.torch_build import no_gpu_reason

Source = Literal["nvidia-smi", "torch", "--card", "--vram", "MAX_CUDA_VRAM", "none"]

UNNAMED: Final = "unnamed GPU"
"""The name of a GPU of which only the memory is given."""

_SMI: Final = ("nvidia-smi", "--query-gpu=name,memory.total,memory.reserved", "--format=csv,noheader,nounits")
_OLD_SMI: Final = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
"""Of drivers before 510, which do not tell what they reserve."""

_SMI_TIMEOUT_S: Final = 20
_TORCH_TIMEOUT_S: Final = 120
_MIB_PER_GIB: Final = 1024
_NVIDIA = re.compile(r"auto|cuda(?::(\d+))?")


class _TorchAnswer(BaseModel):
    device: str
    name: str
    vram_gb: float


@dataclass(frozen=True, slots=True)
class DetectedGpu:
    """A GPU, its memory in GiB, the source of that, and torch's type of device.

    Without a GPU ``vram_gb`` is 0, and ``why`` says what was tried.
    """

    name: str
    vram_gb: float
    by: Source
    why: str = ""
    kind: str = "cuda"


class DeviceMissing(Exception):
    """The device that ``ACESTEP_DEVICE`` names does not exist; the message says which do."""


def find(device: str, environ: Mapping[str, str]) -> DetectedGpu:
    """Return the GPU that a worker with this ``ACESTEP_DEVICE`` and environment would use.

    Raises:
        DeviceMissing: torch does not see that device.
    """
    asked = device.strip().lower()
    if asked == "cpu":
        return DetectedGpu("CPU", 0, "none", "ACESTEP_DEVICE is cpu")
    smi = _ask_smi(asked, environ)
    if isinstance(smi, DetectedGpu):
        return smi
    # A device that is named is left to torch, whose error lists the devices that exist.
    if asked == "auto" and (why := no_gpu_reason()) is not None:
        return DetectedGpu("no GPU", 0, "none", f"{smi}, and {why}")
    return _ask_torch(asked, environ, smi)


def _ask_smi(asked: str, environ: Mapping[str, str]) -> DetectedGpu | str:
    """Return the GPU, or why nvidia-smi does not name it."""
    entry = _entry(asked, environ)
    if entry is None:
        return "nvidia-smi cannot identify the device"
    try:
        done = _run((*_SMI, f"--id={entry}"), environ, _SMI_TIMEOUT_S)
        if "memory.reserved" in done.stdout + done.stderr:
            done = _run((*_OLD_SMI, f"--id={entry}"), environ, _SMI_TIMEOUT_S)
    except FileNotFoundError:
        return "there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"
    rows = [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if row]
    try:
        name, mib, *reserved = rows[0]
        return DetectedGpu(name, (float(mib) - _reserved(reserved)) / _MIB_PER_GIB, "nvidia-smi")
    except (IndexError, ValueError):
        return f"nvidia-smi lists no GPU ({_last_line(done)})"


def _reserved(told: Sequence[str]) -> float:
    """Return the MiB that driver and firmware keep, which torch, and so a worker, does not count; 0: not told."""
    try:
        return float(told[0])
    except (IndexError, ValueError):
        return 0.0


def _entry(asked: str, environ: Mapping[str, str]) -> str | None:
    """Return the GPU for nvidia-smi's ``--id``, a number or UUID; None for MIG instances and hidden GPUs.

    Unless CUDA_VISIBLE_DEVICES is set, torch may number different GPUs in another order than nvidia-smi.
    """
    nvidia = _NVIDIA.fullmatch(asked)
    if nvidia is None:
        return None
    number = int(nvidia[1] or 0)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(number)
    entries = [entry.strip() for entry in visible.split(",")]
    entry = entries[number] if number < len(entries) else ""
    return entry if entry and not entry.startswith(("MIG-", "-")) else None


def _ask_torch(asked: str, environ: Mapping[str, str], before: str) -> DetectedGpu:
    command = (sys.executable, "-m", "acestep_consumer.engine.renderer.probe_device", asked)
    try:
        done = _run(command, environ, _TORCH_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return DetectedGpu("no GPU", 0, "none", f"{before}, and torch does not answer")
    try:
        # The last line: drivers and plug-ins may print while torch is imported.
        answer = _TorchAnswer.model_validate_json(done.stdout.strip().rpartition("\n")[2])
    except ValidationError:
        if "ACESTEP_DEVICE" in done.stderr:
            raise DeviceMissing(_last_line(done)) from None
        return DetectedGpu("no GPU", 0, "none", f"{before}, and torch failed ({_last_line(done)})")
    if answer.vram_gb <= 0:
        return DetectedGpu("no GPU", 0, "none", f"{before}, and torch sees no GPU")
    return DetectedGpu(answer.name, answer.vram_gb, "torch", kind=answer.device.partition(":")[0])


def _run(command: Sequence[str], environ: Mapping[str, str], timeout_s: float) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(  # noqa: S603 - the driver's own tool, and this package
        command, env=dict(environ), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def _last_line(done: "subprocess.CompletedProcess[str]") -> str:
    text = done.stderr.strip() or done.stdout.strip()
    return text.rpartition("\n")[2] or f"exit code {done.returncode}"
