# SPDX-License-Identifier: Apache-2.0
"""RAM of a process and the RAM available to it, as Linux reports them (None elsewhere)."""

import os
from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_HELD = ("RssAnon:", "RssShmem:")
_KIB = 1024


def held_bytes(pid: int) -> int | None:
    """Return the resident memory of a process in bytes, without mapped files; None when it is unknown.

    Checkpoints are mapped files, and the kernel reclaims their pages when it needs them.
    """
    try:
        lines = (_PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    held = [int(line.split()[1]) * _KIB for line in lines if line.startswith(_HELD)]
    return sum(held) if held else None


def available_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Return the bytes that this process and its children may hold: the machine's RAM, or its cgroup's limit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in os.sysconf_names else 0
    return min((limit for limit in (machine, *_limits(proc, cgroups)) if limit > 0), default=None)


def _limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """Yield the limits of every cgroup that this process is in, of version 2 and 1."""
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
    """Yield the limits from a group up to the root. Inside a container the path may be the host's."""
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
