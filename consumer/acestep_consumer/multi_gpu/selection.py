# SPDX-License-Identifier: Apache-2.0
"""Chooses the GPUs that get a worker: the visible ones, or those that ``--gpus`` lists. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from acestep_consumer.multi_gpu.device_count import DeviceCount

ALL: Final = "all"
_MIG = "MIG-"


class BadChoice(Exception):
    """``--gpus`` is malformed; the message says what is allowed."""


class GpuMissing(Exception):
    """No such GPU was found; the message says which there are and what to do."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """``number``: as in ``--gpus``. ``visibility``: the variables that make only this GPU visible to a process."""

    number: int
    visibility: Mapping[str, str]

    @property
    def name(self) -> str:
        """Its name in logs and worker ids."""
        return f"gpu{self.number}"


def parse(text: str) -> tuple[int, ...] | None:
    """Parse ``0,2`` into numbers, in that order, and ``all`` into None.

    Raises:
        BadChoice: it is neither, or a number occurs twice.
    """
    if text.strip().lower() == ALL:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise BadChoice(f"--gpus {text}: give `all`, or numbers as in nvidia-smi, such as 0,2")
    numbers = tuple(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise BadChoice(f"--gpus {text}: a number occurs twice; each GPU gets one worker")
    return numbers


def in_pci_order(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with GPUs numbered as in nvidia-smi, unless it sets another order.

    CUDA's default is the fastest GPU first.
    """
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **environ}


def visible(found: DeviceCount, environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """List the GPUs that torch sees. If a variable restricts them, they are numbered by position in its list.

    Its entries (numbers, UUIDs or MIG instances) are passed on unchanged.

    Raises:
        GpuMissing: there is none, or the variable lists one that torch does not see.
    """
    names = _variables(found)
    given = next((name for name in names if name in environ), None)
    entries = [str(number) for number in range(found.count)] if given is None else _split(environ[given])
    if not found.count or not entries:
        raise GpuMissing(_no_gpu(found, given, environ))
    # CUDA shows a process only one MIG instance, however many are listed, so these cannot be counted.
    if len(entries) != found.count and not any(entry.startswith(_MIG) for entry in entries):
        raise GpuMissing(
            f"{given}={environ[given or '']} names {len(entries)} GPUs, torch sees {found.count} of them; correct it "
            "(`nvidia-smi -L` or `rocm-smi` lists all GPUs)"
        )
    return tuple(Gpu(number, dict.fromkeys(names, entry)) for number, entry in enumerate(entries))


def choose(asked: tuple[int, ...] | None, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return the GPUs with these numbers, in this order; None: all.

    Raises:
        GpuMissing: a number is too high.
    """
    if asked is None:
        return tuple(gpus)
    missing = [number for number in asked if number >= len(gpus)]
    if missing:
        there = f"GPU 0 is the only one here: use --gpus {ALL} or --gpus 0"
        if len(gpus) > 1:
            there = f"there are {len(gpus)}, numbered 0 to {len(gpus) - 1}; `0,1` is two GPUs, `1` only the second"
        raise GpuMissing(f"there is no GPU {', '.join(map(str, missing))}: {there}")
    return tuple(gpus[number] for number in asked)


def _variables(found: DeviceCount) -> tuple[str, ...]:
    """Variables that restrict GPUs, by precedence. ROCm reads both, and vLLM requires them to agree."""
    return ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") if found.hip else ("CUDA_VISIBLE_DEVICES",)


def _split(value: str) -> list[str]:
    return [entry.strip() for entry in value.split(",") if entry.strip()]


def _no_gpu(found: DeviceCount, given: str | None, environ: Mapping[str, str]) -> str:
    if not found.cuda and not found.hip:
        cure = "install a build for this GPU, or run without --gpus"
        return f"torch {found.torch} is built for neither CUDA nor ROCm; {cure}"
    if given is not None:
        return f"torch {found.torch} sees no GPU with {given}={environ[given]}; correct or unset it"
    driver = "rocm-smi" if found.hip else "nvidia-smi"
    return f"torch {found.torch} sees no GPU; does `{driver}` list one? Without a GPU, run without --gpus"
