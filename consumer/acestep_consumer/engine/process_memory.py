# SPDX-License-Identifier: Apache-2.0
"""How much RAM a process holds, and how much there is for it. Asked of Linux; elsewhere the answer is None."""

import os
from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_HELD = ("RssAnon:", "RssShmem:")
_KIB = 1024


def held_bytes(pid: int, proc: Path = _PROC) -> int | None:
    """Return the resident memory of a process that only its end frees; None when that cannot be told.

    Mapped files are not in it: checkpoints are mapped, and the kernel takes such pages back when it wants them.
    """
    try:
        lines = (proc / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    held = [int(line.split()[1]) * _KIB for line in lines if line.startswith(_HELD)]
    return sum(held) if held else None


def available_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Return what this process and its children may hold at most: the machine's RAM, or its control group's limit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in os.sysconf_names else 0
    return min((limit for limit in (machine, *_limits(proc, cgroups)) if limit > 0), default=None)


def _limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """Yield the limits of every control group that this process is in, of version 2 and 1. No limit yields nothing."""
    try:
        groups = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            yield from _upwards(cgroups, path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _upwards(cgroups / "memory", path, "memory.limit_in_bytes")


def _upwards(root: Path, path: str, name: str) -> Iterator[int]:
    """Yield the limits from a group up to the root. Inside a container the path may be one of the host's."""
    inner = root / path.lstrip("/")
    for folder in (inner, *inner.parents):
        text = _text(folder / name)
        if text.isdecimal():  # not "max"
            yield int(text)
        if folder == root:
            return


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""
