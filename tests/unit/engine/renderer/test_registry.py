# SPDX-License-Identifier: Apache-2.0
"""Where a model name leads."""

import json
from pathlib import Path

import pytest

from acestep_consumer.engine.published_models import PUBLISHED, is_dit
from acestep_consumer.engine.renderer.registry import HUB, Checkpoint, CheckpointError, resolve

DITS = [*filter(is_dit, PUBLISHED)]


def checkpoint_at(folder: Path, kind: str = "AceStepPipeline") -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}), encoding="utf-8")
    return folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path / "mine")
    assert resolve(str(folder), None) == Checkpoint("mine", folder=folder)


def test_a_name_is_looked_up_in_the_checkpoint_folder_before_the_hub(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path / "acestep-v15-xl-turbo")
    assert resolve("acestep-v15-xl-turbo", tmp_path) == Checkpoint("acestep-v15-xl-turbo", folder=folder)


@pytest.mark.parametrize(("name", "hub_id"), HUB.items())
def test_a_published_model_is_found_on_the_hub_by_name_and_by_id(name: str, hub_id: str, tmp_path: Path) -> None:
    assert resolve(name, tmp_path) == resolve(hub_id, None) == Checkpoint(name, hub_id=hub_id)


def test_a_hub_id_that_nobody_listed_is_called_by_its_last_part() -> None:
    assert resolve("somebody/my-song-model", None) == Checkpoint("my-song-model", hub_id="somebody/my-song-model")


@pytest.mark.parametrize("name", sorted(set(DITS) - set(HUB)))
def test_a_published_model_that_is_not_on_the_disk_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        resolve(name, tmp_path)
    text = str(refusal.value)
    assert all(
        part in text for part in (str(tmp_path / name), f"acestep-consumer models pull {name} --checkpoints {tmp_path}")
    )


def test_an_unknown_name_lists_where_it_was_looked_for_and_what_is_known() -> None:
    with pytest.raises(CheckpointError) as refusal:
        resolve("acestep-v15-tubro", None)
    text = str(refusal.value)
    assert all(part in text for part in ("acestep-v15-tubro", "ACESTEP_CHECKPOINT_DIR is not set", *HUB, *DITS))


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json", "silence_latent.pt"])
def test_a_folder_in_the_original_layout_is_taken_as_it_is(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "acestep-v15-turbo"
    folder.mkdir()
    (folder / file).touch()
    assert resolve("acestep-v15-turbo", tmp_path) == Checkpoint("acestep-v15-turbo", folder=folder, original=True)


def test_a_folder_that_is_no_checkpoint_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    (tmp_path / "acestep-v15-xl-turbo").mkdir()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors .* nor model_index\.json"):
        resolve("acestep-v15-xl-turbo", tmp_path)


def test_another_kind_of_pipeline_is_named(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path / "painter", "StableDiffusionPipeline")
    with pytest.raises(CheckpointError, match="holds a StableDiffusionPipeline"):
        resolve(str(folder), None)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_an_index_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model_index\.json cannot be read"):
        resolve(str(tmp_path), None)
