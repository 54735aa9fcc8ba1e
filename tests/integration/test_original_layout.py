# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in ACE-Step's original layout load as they are, and are the same models as in diffusers' layout."""

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from acestep_consumer.commands.doctor.models import judge_model
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import LoadedModel
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.engine.renderer.checkpoints.checkpoint import ModelHandle, load_models
from acestep_consumer.engine.renderer.checkpoints.checkpoint_check import check_checkpoints
from acestep_consumer.engine.renderer.checkpoints.original_weights import read_silence
from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError
from acestep_consumer.engine.renderer.device import DeviceReport
from acestep_consumer.engine.testing.tiny_checkpoint import BASE, TURBO
from tests.support.original_layout import Payload, shard, write_comfyui, write_gguf, write_original

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


def test_a_file_of_comfyuis_is_the_same_model_with_config_and_silence_from_the_folder_beside_it(
    originals: Path, tiny_checkpoints: Path, tmp_path: Path
) -> None:
    checkpoints = Path(shutil.copytree(originals, tmp_path / "checkpoints"))
    file = write_comfyui(checkpoints, TURBO, checkpoints / "ace_step_turbo_aio.safetensors")
    for weights in (*checkpoints.glob("*/model.safetensors"), *checkpoints.glob("vae/*.safetensors")):
        weights.unlink()
    (model,) = load(checkpoints, file.name)
    assert model.model == LoadedModel("ace_step_turbo_aio", Variant.TURBO)
    assert_same_model(model, load(tiny_checkpoints, TURBO)[0])


def test_a_gguf_file_is_the_same_model(originals: Path, tiny_checkpoints: Path, tmp_path: Path) -> None:
    file = write_gguf(originals / BASE, tmp_path / "acestep-v15-base-F32.gguf")
    (model,) = load(originals, str(file))
    assert model.model == LoadedModel("acestep-v15-base-F32", Variant.BASE)
    assert_same_model(model, load(tiny_checkpoints, BASE)[0])


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in {**config, **fields}.items() if fields.get(name, "kept") is not None}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")


def lose_a_shard(folder: Path) -> None:
    shard(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1_000])


def language_model(folder: Path) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, folder / "model.safetensors")


def no_weight_map(folder: Path) -> None:
    shard(folder, 3)
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")


def lose_the_tokenizer(folder: Path) -> None:
    for path in (folder.parent / "Qwen3-Embedding-0.6B").glob("tokenizer*"):
        path.unlink()


def quantised(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.proj_in.1.weight"] = tensors["decoder.proj_in.1.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")


def fewer_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.lyric_encoder.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def hostile_silence(folder: Path) -> None:
    torch.save(Payload(folder / "code-has-run"), folder / "silence_latent.pt")


def hostile_pickle(folder: Path) -> None:
    (folder / "silence_latent.pt").write_bytes(pickle.dumps(Payload(folder / "code-has-run")))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a model of another kind": (
        lambda folder: edit_config(folder, model_type="llama"),
        "holds a llama.*: choose another",
    ),
    "a config without a type": (lambda folder: edit_config(folder, model_type=None), "model of no type"),
    "a config without a field": (lambda folder: edit_config(folder, rope_theta=None), "has no field rope_theta"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
    "weights of another model": (language_model, "decoder.proj_in.1.weight is missing"),
    "weights of another width": (
        lambda folder: edit_config(folder, hidden_size=64),
        r"decoder.proj_in.1.weight is \[32, 12, 2\] in place of \[64, 12, 2\]: download the model again",
    ),
    "fewer layers": (lambda folder: edit_config(folder, num_hidden_layers=3), "layers.2.mlp.up_proj.weight is missing"),
    "more layers": (lambda folder: edit_config(folder, num_hidden_layers=1), "more than 1 layers"),
    "a shard missing": (lose_a_shard, "lacks model-00002-of-00003.safetensors"),
    "a clone without Git LFS": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha"),
        "model.safetensors is a pointer of Git LFS.*run `git lfs pull`",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
    "weights cut off": (lambda folder: cut_off(folder / "model.safetensors"), r"has [\d,]+ of [\d,]+ bytes"),
    "a VAE cut off": (
        lambda folder: cut_off(folder.parent / "vae/diffusion_pytorch_model.safetensors"),
        r"has [\d,]+ of [\d,]+ bytes",
    ),
    "a text encoder without weights": (
        lambda folder: (folder.parent / "Qwen3-Embedding-0.6B/model.safetensors").unlink(),
        "Qwen3-Embedding-0.6B is incomplete: no weights",
    ),
    "a text encoder without a tokenizer": (
        lose_the_tokenizer,
        "Qwen3-Embedding-0.6B is incomplete: no tokenizer.*models pull Qwen3-Embedding-0.6B",
    ),
    "a VAE of another model": (
        lambda folder: edit_config(folder.parent / "vae", decoder_input_channels=7),
        "vae is of another model: decoder_input_channels is 7 in place of .*models pull vae",
    ),
    "a text encoder of another size": (
        lambda folder: edit_config(folder.parent / "Qwen3-Embedding-0.6B", hidden_size=7),
        "Qwen3-Embedding-0.6B is of another model: hidden_size is 7",
    ),
    "a config with a text for a number": (
        lambda folder: edit_config(folder, num_hidden_layers="two"),
        "num_hidden_layers of config.json is 'two'",
    ),
    "a config with a number for a list": (lambda folder: edit_config(folder, layer_types=3), "layer_types .* is 3"),
    "an index of shards without a list": (no_weight_map, "it has no weight_map"),
    "quantised weights": (
        quantised,
        r"holds quantised tensors \(F8_E4M3\), which cannot be used: take the model in BF16",
    ),
    "no VAE": (lambda folder: shutil.rmtree(folder.parent / "vae"), "the vae folder .* is missing"),
    "no silence": (lambda folder: (folder / "silence_latent.pt").unlink(), "lacks silence_latent.pt"),
    "silence that is code": (hostile_silence, "holds code .*which is not run"),
    "silence that is a plain pickle": (hostile_pickle, "is not a tensor that torch saved"),
    "silence cut off": (lambda folder: cut_off(folder / "silence_latent.pt"), "is not a tensor that torch saved"),
}


@pytest.mark.parametrize(("damage", "said"), BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_one_line_found_in_under_a_second_before_any_is_loaded(
    damage: Callable[[Path], object], said: str, originals: Path, tmp_path: Path
) -> None:
    checkpoints = Path(shutil.copytree(originals, tmp_path / "checkpoints"))
    damage(checkpoints / TURBO)
    settings = EngineSettings.model_validate({"checkpoint_dir": checkpoints, "config_path": TURBO})
    began = time.process_time()
    with pytest.raises(CheckpointError, match=said) as caught:
        check_checkpoints(settings)
    assert time.process_time() - began < 1
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=said):
        load(checkpoints, TURBO)
    assert not (checkpoints / TURBO / "code-has-run").exists()


def test_a_tensor_that_is_missing_inside_is_found_when_the_model_is_loaded(originals: Path, tmp_path: Path) -> None:
    checkpoints = Path(shutil.copytree(originals, tmp_path / "checkpoints"))
    fewer_tensors(checkpoints / TURBO)
    with pytest.raises(CheckpointError, match=r"condition encoder: lyric_encoder\.norm\.weight is missing") as caught:
        load(checkpoints, TURBO)
    assert "\n" not in str(caught.value)


def test_silence_that_holds_more_than_a_tensor_is_refused_without_the_check_too(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "code-has-run"), tmp_path / "silence_latent.pt")
    with pytest.raises(CheckpointError, match="holds more than one tensor"):
        read_silence(tmp_path / "silence_latent.pt")
    assert not (tmp_path / "code-has-run").exists()


def test_a_file_of_comfyuis_without_a_config_beside_it_says_what_to_put_there(originals: Path, tmp_path: Path) -> None:
    file = write_comfyui(originals, TURBO, tmp_path / "ace_step_turbo_aio.safetensors")
    with pytest.raises(CheckpointError, match=r"no config.json and no silence_latent.pt.*acestep-v15-turbo beside it"):
        check_checkpoints(EngineSettings(config_path=str(file)))


def test_a_file_that_could_be_turbo_or_base_must_say_which_in_its_name(originals: Path, tmp_path: Path) -> None:
    file = write_comfyui(originals, TURBO, tmp_path / "ace_step_aio.safetensors")
    with pytest.raises(CheckpointError, match=r"could be acestep-v15-base or acestep-v15-turbo: put turbo"):
        check_checkpoints(EngineSettings(config_path=str(file), checkpoint_dir=originals))


def test_a_quantised_gguf_file_is_refused(originals: Path) -> None:
    file = Path(__file__).parents[1] / "unit/engine/renderer/checkpoints/gguf/quantised.gguf"
    with pytest.raises(CheckpointError, match=r"holds quantised tensors .* take the file with BF16"):
        check_checkpoints(EngineSettings(config_path=str(file), checkpoint_dir=originals))


def test_diffusers_layout_is_checked_too(tiny_checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoints / TURBO, tmp_path / TURBO))
    check_checkpoints(EngineSettings(config_path=str(folder)))
    cut_off(folder / "transformer/diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.safetensors has [\d,]+ of [\d,]+ bytes"):
        check_checkpoints(EngineSettings(config_path=str(folder)))


def test_a_part_that_is_missing_in_diffusers_layout_is_named(tiny_checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoints / TURBO, tmp_path / TURBO))
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match=f"{folder} is incomplete: vae: the folder is missing"):
        check_checkpoints(EngineSettings(config_path=str(folder)))


def test_a_folder_of_models_in_place_of_one_names_them(originals: Path) -> None:
    with pytest.raises(CheckpointError, match=f"It holds {BASE}, {TURBO}: name one of them"):
        check_checkpoints(EngineSettings(config_path=str(originals)))


def test_a_place_that_the_system_refuses_is_one_line() -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read: File name too long: check its path"):
        check_checkpoints(EngineSettings(config_path="/" + "x" * 5_000))


def test_doctor_finds_a_whole_model_complete(originals: Path) -> None:
    found = judge_model(TURBO, originals, {})
    assert (found.level, found.said) == ("ok", f"{originals / TURBO} is complete")


def test_a_model_that_is_not_on_this_disk_is_an_error_unless_it_is_named_by_its_hub_id(tmp_path: Path) -> None:
    check_checkpoints(EngineSettings(config_path="somebody/my-song-model", checkpoint_dir=tmp_path))
    with pytest.raises(CheckpointError, match=f"models pull acestep-v15-xl-sft --checkpoints {tmp_path}"):
        check_checkpoints(EngineSettings(config_path="acestep-v15-xl-sft", checkpoint_dir=tmp_path))
