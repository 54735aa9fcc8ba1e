# SPDX-License-Identifier: Apache-2.0
"""Where a language model is looked for: a path, the checkpoint folder, the hub, in this order."""

from pathlib import Path

import pytest

from acestep_consumer.engine.planner.registry import HUB, LmLocation, LmNotFound, resolve
from acestep_consumer.policy.tiers import LMS


def lm(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_goes_before_the_checkpoint_folder_and_that_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "acestep-5Hz-lm-0.6B"
    assert resolve(name, tmp_path / "checkpoints") == LmLocation(hub_id=f"ACE-Step/{name}")
    second = lm(tmp_path / "checkpoints" / name)
    assert resolve(name, tmp_path / "checkpoints") == LmLocation(folder=second)
    first = lm(tmp_path / name)
    assert resolve(name, tmp_path / "checkpoints") == LmLocation(folder=first)


def test_a_folder_without_a_model_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    with pytest.raises(LmNotFound):
        resolve("ours", tmp_path)


def test_any_hub_id_may_be_named() -> None:
    assert resolve("somebody/their-lm", None) == LmLocation(hub_id="somebody/their-lm")


def test_a_model_that_is_nowhere_is_refused_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(LmNotFound, match=r"looked for .*acestep-5Hz-lm-1\.7B; set ACESTEP_LM_MODEL_PATH"):
        resolve("acestep-5Hz-lm-1.7B", tmp_path)
    with pytest.raises(LmNotFound, match="ACESTEP_CHECKPOINT_DIR is unset"):
        resolve("acestep-5Hz-lm-1.7B", None)


def test_the_hub_has_models_that_the_tiers_know() -> None:
    assert set(HUB) < set(LMS)
