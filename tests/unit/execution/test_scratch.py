# SPDX-License-Identifier: Apache-2.0
"""Scratch folders: one per run and one per worker, gone with it; a killed worker's is removed by the next."""

import errno
import tempfile
from pathlib import Path

import pytest

from acestep_consumer.domain.errors import DiskFull
from acestep_consumer.execution.scratch import scratch_folder, scratch_root, sweep


def test_two_runs_of_one_task_have_a_folder_each(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "song") as first, scratch_folder(tmp_path, "song") as second:
        assert first != second
        assert first.parent == second.parent == tmp_path


def test_the_folder_is_gone_with_what_it_holds_however_the_run_ends(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "song") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_gone_also_when_the_run_is_interrupted(tmp_path: Path) -> None:
    def run() -> None:
        with scratch_folder(tmp_path, "song"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_a_folder_is_the_workers_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> str:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(DiskFull), scratch_folder(tmp_path, "song"):
        pass
    with pytest.raises(DiskFull), scratch_root(tmp_path):
        pass


def test_a_workers_folder_is_gone_with_the_worker(tmp_path: Path) -> None:
    with scratch_root(tmp_path / "new") as root:
        (root / "song").mkdir()
        (root / "song" / "0.wav").write_text("x")
        assert root.parent == tmp_path / "new"
    assert list((tmp_path / "new").iterdir()) == []


def test_the_folders_of_living_workers_stay(tmp_path: Path) -> None:
    with scratch_root(tmp_path) as first, scratch_root(tmp_path) as second:
        assert set(tmp_path.iterdir()) == {first, second}


def test_the_folder_of_a_dead_worker_goes_with_all_it_holds(tmp_path: Path) -> None:
    dead = tmp_path / "acestep-dead"
    (dead / "song" / "deep").mkdir(parents=True)
    (dead / ".acestep-owner").touch()
    with scratch_root(tmp_path) as root:
        assert list(tmp_path.iterdir()) == [root]


def test_what_is_not_marked_as_a_workers_folder_stays_whatever_it_is_called(tmp_path: Path) -> None:
    unmarked, file, elsewhere = tmp_path / "acestep-mine", tmp_path / "acestep-file", tmp_path / "elsewhere"
    unmarked.mkdir()
    file.touch()
    elsewhere.mkdir()
    (elsewhere / ".acestep-owner").touch()
    (tmp_path / "acestep-link").symlink_to(elsewhere)
    before = set(tmp_path.iterdir())
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == before
    assert list(elsewhere.iterdir())
