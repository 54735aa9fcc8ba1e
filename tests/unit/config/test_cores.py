# SPDX-License-Identifier: Apache-2.0
"""How many cores a process may use, and how many of them encode."""

import os
from pathlib import Path

import pytest

from acestep_consumer.config import cores
from acestep_consumer.config.cores import encoder_count, usable_cores


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of a process on eight cores of a larger machine; its own is ``/service/worker``."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    own = tmp_path / "own"
    own.write_text("3:cpuset:/elsewhere\n0::/service/worker\n", encoding="utf-8")
    monkeypatch.setattr(cores, "_OWN_GROUP", own)
    monkeypatch.setattr(cores, "_GROUPS", tmp_path)
    (tmp_path / "service/worker").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "usable"),
    [
        ({}, 8),
        ({"service/worker": "max 100000"}, 8),
        ({"service/worker": "400000 100000"}, 4),
        ({"service/worker": "max 100000", "service": "250000 100000"}, 2),
        ({"service/worker": "50000 100000"}, 1),
        ({"service/worker": "1600000 100000"}, 8),
        ({"": "300000 100000"}, 3),
        ({"service/worker": "unreadable"}, 8),
    ],
    ids=["no limit", "unlimited", "own", "of its parent", "half a core", "more than cores", "of a container", "odd"],
)
def test_cores_are_those_that_affinity_and_the_quota_allow(groups: Path, limits: dict[str, str], usable: int) -> None:
    for group, text in limits.items():
        (groups / group / "cpu.max").write_text(f"{text}\n", encoding="ascii")
    assert usable_cores() == usable


def test_without_control_groups_the_affinity_counts(groups: Path) -> None:
    (groups / "own").unlink()
    assert usable_cores() == 8


@pytest.mark.usefixtures("groups")
def test_there_are_never_more_encoders_than_cores_in_all_workers_together() -> None:
    assert [encoder_count(wanted) for wanted in (None, 1, 9)] == [8, 1, 8]
    assert [encoder_count(None, workers) for workers in (2, 3, 8)] == [4, 2, 1]
    assert [encoder_count(wanted, 2) for wanted in (1, 4, 7)] == [1, 4, 4]
    assert encoder_count(None, 9) == 1  # each worker needs one


def test_there_are_no_more_than_sixteen_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 64)
    assert (encoder_count(None), encoder_count(40), encoder_count(None, 2)) == (16, 40, 16)
