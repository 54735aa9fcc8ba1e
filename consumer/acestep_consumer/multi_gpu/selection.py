# SPDX-License-Identifier: Apache-2.0
"""Which GPUs get a worker: those that are visible, and among them the ones that were asked for. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from acestep_consumer.multi_gpu.device_count import DeviceCount

ALL: Final = "all"
_MIG = "MIG-"


class BadChoice(Exception):
    """``--gpus`` cannot be read; the text says what it may be."""


class GpuMissing(Exception):
    """There is no such GPU; the text says what there is and what to do."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """``number``: as ``--gpus`` counts. ``visibility``: the variables that show a process this GPU and no other."""

    number: int
    visibility: Mapping[str, str]

    @property
    def name(self) -> str:
        """What it is called in logs and worker ids."""
        return f"gpu{self.number}"


def parse(text: str) -> tuple[int, ...] | None:
    """Read ``0,2`` as numbers in that order, ``all`` as None.

    Raises:
        BadChoice: it is neither, or a number stands there twice.
    """
    if text.strip().lower() == ALL:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise BadChoice(f"--gpus {text}: give `all`, or numbers as nvidia-smi counts them, such as 0,2")
    numbers = tuple(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise BadChoice(f"--gpus {text}: a number stands there twice; a GPU gets one worker")
    return numbers


def ordered(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with GPUs numbered as nvidia-smi numbers them, unless somebody chose another order.

    CUDA's own default puts the fastest card first.
    """
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **environ}


def visible(census: DeviceCount, environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """List the GPUs that torch sees. Where a variable restricts them, they are numbered by their place in its list.

    Its entries, be they numbers, UUIDs or MIG instances, are passed on as they are.

    Raises:
        GpuMissing: there is none, or the variable names one that torch does not see.
    """
    names = _variables(census)
    given = next((name for name in names if name in environ), None)
    entries = [str(number) for number in range(census.count)] if given is None else _split(environ[given])
    if not census.count or not entries:
        raise GpuMissing(_none(census, given, environ))
    # CUDA shows one MIG instance to a process, however many are listed: they cannot be counted.
    if len(entries) != census.count and not any(entry.startswith(_MIG) for entry in entries):
        raise GpuMissing(
            f"{given}={environ[given or '']} names {len(entries)} GPUs, torch sees {census.count} of them; correct it "
            "(`nvidia-smi -L` or `rocm-smi` lists what there is)"
        )
    return tuple(Gpu(number, dict.fromkeys(names, entry)) for number, entry in enumerate(entries))


def choose(asked: tuple[int, ...] | None, found: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Pick the GPUs with these numbers, in this order; None picks all.

    Raises:
        GpuMissing: a number is too high.
    """
    if asked is None:
        return tuple(found)
    missing = [number for number in asked if number >= len(found)]
    if missing:
        there = f"GPU 0 is the only one here; for it say --gpus {ALL} or --gpus 0"
        if len(found) > 1:
            there = f"there are {len(found)}, numbered 0 to {len(found) - 1}; `0,1` is two GPUs, `1` the second alone"
        raise GpuMissing(f"there is no GPU {', '.join(map(str, missing))}: {there}")
    return tuple(found[number] for number in asked)


def _variables(census: DeviceCount) -> tuple[str, ...]:
    """What restricts GPUs, the strongest first. ROCm reads both names, and vLLM wants them to agree there."""
    return ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") if census.hip else ("CUDA_VISIBLE_DEVICES",)


def _split(value: str) -> list[str]:
    return [entry.strip() for entry in value.split(",") if entry.strip()]


def _none(census: DeviceCount, given: str | None, environ: Mapping[str, str]) -> str:
    if not census.cuda and not census.hip:
        cure = "install a build for the card, or run without --gpus"
        return f"torch {census.torch} is built for neither CUDA nor ROCm; {cure}"
    if given is not None:
        return f"torch {census.torch} sees no GPU with {given}={environ[given]}; correct or unset it"
    driver = "rocm-smi" if census.hip else "nvidia-smi"
    return f"torch {census.torch} sees no GPU; does `{driver}` list one? Without a GPU, run without --gpus"
