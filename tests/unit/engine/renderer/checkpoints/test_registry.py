# SPDX-License-Identifier: Apache-2.0
"""Where a model name leads."""

import json
from pathlib import Path

import pytest

from acestep_consumer.engine.published_models import PUBLISHED, is_dit
from acestep_consumer.engine.renderer.checkpoints.registry import (
    HUB,
    Checkpoint,
    CheckpointError,
    ModelNotFound,
    resolve,
)

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
def test_a_repository_in_diffusers_layout_is_downloaded_by_its_id_alone(name: str, hub_id: str, tmp_path: Path) -> None:
    assert resolve(hub_id, None, {"HF_HUB_CACHE": str(tmp_path)}) == Checkpoint(name, hub_id=hub_id)


@pytest.mark.parametrize(("name", "hub_id"), HUB.items())
def test_what_the_hubs_cache_holds_of_it_is_found_by_name_and_by_id(name: str, hub_id: str, tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "0abc")
    for named in (name, hub_id):
        assert resolve(named, None, {"HF_HUB_CACHE": str(tmp_path)}) == Checkpoint(name, folder=folder)


def test_a_hub_id_that_nobody_listed_is_called_by_its_last_part() -> None:
    assert resolve("somebody/my-song-model", None) == Checkpoint("my-song-model", hub_id="somebody/my-song-model")


@pytest.mark.parametrize("named", [*DITS, "ACE-Step/acestep-v15-xl-sft"])
def test_a_published_model_that_is_not_on_the_disk_says_how_to_get_it(named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as refusal:
        resolve(named, tmp_path, {"HF_HUB_CACHE": str(tmp_path / "hub")})
    text, name = str(refusal.value), named.rpartition("/")[2]
    assert all(
        part in text for part in (str(tmp_path / name), f"acestep-consumer models pull {name} --checkpoints {tmp_path}")
    )


def test_models_that_are_there_in_place_of_the_wanted_one_are_named(tmp_path: Path) -> None:
    checkpoint_at(tmp_path / "acestep-v15-sft")
    (tmp_path / "acestep-v15-base").mkdir()
    (tmp_path / "acestep-v15-base" / "silence_latent.pt").touch()
    (tmp_path / "vae").mkdir()
    with pytest.raises(ModelNotFound, match="holds acestep-v15-base, acestep-v15-sft: choose with ACESTEP_CONFIG_PATH"):
        resolve("acestep-v15-turbo", tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file", "is a file: ACESTEP_CHECKPOINT_DIR names a folder, ACESTEP_CONFIG_PATH a model's file"),
        ("none", "does not exist: correct ACESTEP_CHECKPOINT_DIR"),
    ],
)
def test_a_checkpoint_folder_that_is_none_is_told(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelNotFound) as refusal:
        resolve("acestep-v15-turbo", tmp_path / name)
    assert f"{tmp_path / name} {said}" in str(refusal.value)
    assert ("models pull" in str(refusal.value)) == (name == "none")


def test_a_checkpoint_folder_that_is_a_model_itself_names_the_one_to_set(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints/acestep-v15-turbo"
    folder.mkdir(parents=True)
    (folder / "silence_latent.pt").touch()
    with pytest.raises(ModelNotFound, match=f"is a model itself: set ACESTEP_CHECKPOINT_DIR to {folder.parent}$"):
        resolve("acestep-v15-turbo", folder)


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
