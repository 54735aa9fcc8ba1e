# SPDX-License-Identifier: Apache-2.0
"""RAM as Linux tells it: what a process holds, and what there is for it under control groups of both versions."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.engines import watchdog_limits_of
from acestep_consumer.engine.process_memory import available_bytes, held_bytes

MIB = 1 << 20


def test_memory_that_is_held_is_seen_and_a_mapped_file_is_not(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * (96 * MIB))
    before = held_bytes(os.getpid())
    # Straight from the kernel: an allocator may have memory to give that the process holds already.
    with (
        mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held,
        file.open("rb") as weights,
        mmap.mmap(weights.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        held.write(b"x" * len(held))
        assert sum(mapped[i] for i in range(0, len(mapped), 4096)) > 0
        after = held_bytes(os.getpid())
    assert before is not None
    assert after is not None
    # What was written from may be held as well.
    assert 32 * MIB * 0.9 < after - before < 72 * MIB


def test_a_process_that_is_gone_holds_nothing_that_is_known() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert held_bytes(gone.pid) is None


def groups(root: Path, listed: str, **limits: str) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup of a test's own; ``limits`` by path, with two underscores for a slash."""
    proc, cgroups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(listed)
    for name, limit in limits.items():
        file = cgroups / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    return proc, cgroups


def test_the_smallest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    limits = {"memory_DOT_max": "max", "a__memory_DOT_max": str(5 * MIB), "a__b__memory_DOT_max": str(6 * MIB)}
    assert available_bytes(*groups(tmp_path, "0::/a/b\n", **limits)) == 5 * MIB


def test_in_a_container_the_root_has_the_limit_whatever_the_path(tmp_path: Path) -> None:
    assert available_bytes(*groups(tmp_path, "0::/host/path\n", memory_DOT_max=str(7 * MIB))) == 7 * MIB


def test_version_1_has_a_folder_and_a_name_of_its_own(tmp_path: Path) -> None:
    listed = "5:cpu,cpuacct:/x\n4:memory:/docker/x\n"
    found = groups(tmp_path, listed, memory__docker__x__memory_DOT_limit_in_bytes=str(8 * MIB))
    assert available_bytes(*found) == 8 * MIB


@pytest.mark.parametrize("limit", ["max", str(1 << 62)])
def test_without_a_limit_there_is_what_the_machine_has(tmp_path: Path, limit: str) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_bytes(*groups(tmp_path, "0::/\n", memory_DOT_max=limit)) == machine
    assert available_bytes(tmp_path / "none", tmp_path / "none") == machine


def test_a_limit_that_is_set_holds_and_otherwise_nine_tenths_of_what_there_is() -> None:
    set_ = watchdog_limits_of(EngineSettings(ram_gb=1.5, hang_s=20))
    assert (set_.ram_bytes, set_.ram_source, set_.hang_s) == (1536 * MIB, "ACESTEP_ENGINE_RAM_GB", 20)
    unset, available = watchdog_limits_of(EngineSettings()), available_bytes()
    assert available is not None
    assert (unset.ram_bytes, unset.hang_s) == (round(0.9 * available), 300)
    assert unset.ram_source == "ACESTEP_ENGINE_RAM_GB is unset: 90% of all RAM"
