# SPDX-License-Identifier: Apache-2.0
"""Processor cores that this process may use, and how many of them encode songs."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

MOST_ENCODERS: Final = 16
"""Encoder processes without a setting: more than the songs of one GPU need."""

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return how many cores this process may use, by its affinity and by the quota of its control groups.

    Containers have a quota (``docker run --cpus 4``). Processes that exceed it are all stopped for a part of each tenth
    of a second, that of the GPU's work among them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(max(1, int(quota)) for quota in _quotas())])


def encoder_count(wanted: int | None, workers: int = 1) -> int:
    """Return how many encoders each worker runs: as many as wanted, by default 16, and never more than its cores.

    ``workers`` share the cores of this machine.
    """
    return max(1, min(usable_cores() // workers, wanted or MOST_ENCODERS))


def _quotas() -> Iterator[float]:
    """Yield the cores that each control group of this process allows, where there is a limit (cgroup 2)."""
    try:
        lines = _OWN_GROUP.read_text(encoding="utf-8").splitlines()
        own = next(PurePosixPath(line.removeprefix("0::")) for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    for group in (own, *own.parents):
        try:
            limit, period = (_GROUPS / group.relative_to("/") / "cpu.max").read_text(encoding="ascii").split()
            yield int(limit) / int(period)
        except (OSError, ValueError):  # the root has none; "max" is no limit
            continue
