# SPDX-License-Identifier: Apache-2.0
"""Scratch folders: one per run, gone with it."""

from pathlib import Path

import pytest

from consumer.scratch import scratch_folder


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
