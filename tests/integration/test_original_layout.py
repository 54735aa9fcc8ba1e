# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in ACE-Step's original layout load as they are, and are the same models as in diffusers' layout."""

import shutil
from pathlib import Path

import pytest
import torch

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import LoadedModel
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.engine.renderer.checkpoint import ModelHandle, load_models
from acestep_consumer.engine.renderer.device import DeviceReport
from acestep_consumer.engine.testing.tiny_checkpoint import BASE, TURBO
from tests.support.original_layout import shard, write_original

CPU = DeviceReport(device="cpu", name="CPU", vram_gb=0)
PARTS = (
    "transformer",
    "condition_encoder",
    "audio_tokenizer",
    "audio_token_detokenizer",
    "vae",
    "text_encoder",
)


@pytest.fixture(scope="module")
def originals(tiny_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Turbo and base as their users have them: `checkpoints/` with the VAE and the text encoder beside them."""
    checkpoints = tmp_path_factory.mktemp("original") / "checkpoints"
    for name in (TURBO, BASE):
        write_original(tiny_checkpoints / name, checkpoints)
    return checkpoints


def load(checkpoints: Path, *models: str) -> tuple[ModelHandle, ...]:
    names = dict(zip(("config_path", "config_path2", "config_path3"), models, strict=False))
    settings = EngineSettings.model_validate({"checkpoint_dir": checkpoints, "device": "cpu", **names})
    return load_models(settings, CPU, lambda _: None)


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, those that are not saved as well."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same_model(model: ModelHandle, other: ModelHandle) -> None:
    for part in PARTS:
        mine, others = (state_of(getattr(each.pipeline, part)) for each in (model, other))
        assert mine.keys() == others.keys()
        for name, tensor in mine.items():
            assert (tensor.dtype, tensor.device) == (others[name].dtype, others[name].device), (part, name)
            assert torch.equal(tensor, others[name]), (part, name)
    assert model.pipeline.tokenizer("la la\n").input_ids == other.pipeline.tokenizer("la la\n").input_ids
    settings, others = (
        {name: value for name, value in each.pipeline.scheduler.config.items() if not name.startswith("_")}
        for each in (model, other)
    )
    assert settings == others


@pytest.mark.parametrize("name", [TURBO, BASE])
def test_a_model_is_the_same_in_both_layouts(name: str, originals: Path, tiny_checkpoints: Path) -> None:
    (original,), (converted,) = load(originals, name), load(tiny_checkpoints, name)
    assert original.model == converted.model
    assert_same_model(original, converted)


def test_shards_are_one_model(originals: Path, tiny_checkpoints: Path, tmp_path: Path) -> None:
    checkpoints = Path(shutil.copytree(originals, tmp_path / "checkpoints"))
    shard(checkpoints / TURBO, 3)
    assert_same_model(load(checkpoints, TURBO)[0], load(tiny_checkpoints, TURBO)[0])


def test_a_folder_given_by_its_path_finds_the_vae_and_the_text_encoder_beside_it(originals: Path) -> None:
    (model,) = load(Path("/nowhere"), str(originals / TURBO))
    assert model.model == LoadedModel(TURBO, Variant.TURBO)


def test_models_of_one_folder_hold_the_vae_and_the_text_encoder_once(originals: Path, tiny_checkpoints: Path) -> None:
    turbo, base = load(originals, TURBO, BASE)
    assert turbo.pipeline.text_encoder is base.pipeline.text_encoder
    assert turbo.pipeline.vae is base.pipeline.vae
    one, other = load(originals, TURBO, str(tiny_checkpoints / BASE))
    assert one.pipeline.text_encoder is other.pipeline.text_encoder
    assert one.pipeline.vae is other.pipeline.vae


def test_tensors_of_the_wanted_type_stay_in_the_mapped_file(originals: Path) -> None:
    """Nothing is copied until the weights go to a device."""
    (model,) = load(originals, TURBO)
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(originals / TURBO / "model.safetensors") in mapped
    assert model.pipeline.transformer.dtype is torch.float32
