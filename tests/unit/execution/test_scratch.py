# SPDX-License-Identifier: Apache-2.0
"""Scratch folders: one per worker, gone with it; a killed worker's is removed by the next.

One that vanishes under its worker is made again.
"""

import errno
import fcntl
import shutil
import tempfile
from pathlib import Path

import pytest

from acestep_consumer.domain.errors import DiskFull
from acestep_consumer.execution.scratch import OWNER, ScratchRoot, sweep


def is_locked(folder: Path) -> bool:
    """Whether the folder has the mark of a worker that lives."""
    with (folder / OWNER).open("r+b") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_two_runs_of_one_task_have_a_folder_each(tmp_path: Path) -> None:
    with ScratchRoot(tmp_path) as root:
        first, second = root.new_folder("song"), root.new_folder("song")
        assert first != second
        assert first.parent == second.parent == root.ensure()


def test_a_disk_without_room_for_a_folder_is_the_workers_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> str:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(DiskFull), ScratchRoot(tmp_path):
        pass


def test_a_disk_that_is_full_later_has_no_room_for_a_jobs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> str:
        raise OSError(errno.ENOSPC, "no space left")

    with ScratchRoot(tmp_path) as root:
        monkeypatch.setattr(tempfile, "mkdtemp", full)
        with pytest.raises(DiskFull):
            root.new_folder("song")


def test_a_workers_folder_is_gone_with_the_worker(tmp_path: Path) -> None:
    with ScratchRoot(tmp_path / "new") as root:
        (root.new_folder("song") / "0.wav").write_text("x")
        assert root.ensure().parent == tmp_path / "new"
    assert list((tmp_path / "new").iterdir()) == []


def test_the_folders_of_living_workers_stay(tmp_path: Path) -> None:
    with ScratchRoot(tmp_path) as first, ScratchRoot(tmp_path) as second:
        assert set(tmp_path.iterdir()) == {first.ensure(), second.ensure()}


def test_the_folder_of_a_dead_worker_goes_with_all_it_holds(tmp_path: Path) -> None:
    dead = tmp_path / "acestep-dead"
    (dead / "song" / "deep").mkdir(parents=True)
    (dead / ".acestep-owner").touch()
    with ScratchRoot(tmp_path) as root:
        assert list(tmp_path.iterdir()) == [root.ensure()]


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


def test_a_folder_that_was_removed_is_made_again_with_its_mark_and_gone_with_the_worker(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with ScratchRoot(place) as root:
        for remove in (root.ensure(), place):
            shutil.rmtree(remove)
            folder = root.new_folder("song")
            assert folder.is_dir()
            assert is_locked(folder.parent)
            assert root.ensure() == folder.parent, "once is enough"
        sweep(place)
        assert list(place.iterdir()) == [root.ensure()], "it is a living worker's"
    assert list(place.iterdir()) == []


def test_a_mark_that_was_removed_is_made_again_in_the_same_folder(tmp_path: Path) -> None:
    with ScratchRoot(tmp_path) as root:
        folder = root.new_folder("song")
        (root.ensure() / OWNER).unlink()
        assert root.ensure() == folder.parent
        assert is_locked(folder.parent)
        assert folder.is_dir()


def test_somebody_elses_folder_in_its_place_is_left_alone(tmp_path: Path) -> None:
    with ScratchRoot(tmp_path) as root:
        gone = root.ensure()
        shutil.rmtree(gone)
        (tmp_path / "other").mkdir()
        gone.symlink_to(tmp_path / "other")
        folder = root.new_folder("song")
        assert folder.parent != gone
    assert list((tmp_path / "other").iterdir()) == []
    assert gone.is_symlink()


def test_where_locks_do_not_work_the_folder_is_still_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with ScratchRoot(tmp_path) as root:
        assert root.ensure() == root.ensure()


def test_a_folder_that_cannot_be_made_again_is_an_error_until_it_can(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with ScratchRoot(place) as root:
        shutil.rmtree(place)
        place.touch()
        with pytest.raises(OSError, match="File exists"):
            root.new_folder("song")
        place.unlink()
        assert root.new_folder("song").is_dir()
