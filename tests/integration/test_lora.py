# SPDX-License-Identifier: Apache-2.0
"""LoRAs in the weights of a real, tiny DiT: the same output as diffusers with the adapter as separate layers."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.errors import InputUnreadable
from acestep_consumer.engine.renderer.lora import AdaptedModelCache, Lora
from acestep_consumer.engine.renderer.offload import ModuleSwapper
from acestep_consumer.engine.renderer.quantization import weight_bytes
from acestep_consumer.engine.renderer.startup import open_runtime
from acestep_consumer.engine.testing import tiny_checkpoint
from tests.support.loras import (
    LAYERS,
    RANK,
    diffusers_key,
    down_up_key,
    peft_key,
    random_lora,
    write_lora,
    write_peft_lora,
)

Shared = dict[str, torch.Tensor]


@pytest.fixture
def dit(tiny_checkpoints: Path) -> Any:
    """The tiny turbo DiT, in float32."""
    return load(tiny_checkpoints)


def load(checkpoints: Path) -> Any:
    folder = checkpoints / tiny_checkpoint.TURBO / "transformer"
    return AceStepTransformer1DModel.from_pretrained(folder).eval().requires_grad_(requires_grad=False)


@pytest.fixture
def untouched(dit: Any) -> Iterator[None]:
    """Whatever the test does, the base stays as it was, down to the last bit."""
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    kinds = [type(module) for module in dit.modules()]
    yield
    after = dit.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(module) for module in dit.modules()] == kinds


def run_dit(dit: Any, **kwargs: Any) -> torch.Tensor:
    """One step over two samples of 30 frames, [2, 30, channels]."""
    generator = torch.Generator().manual_seed(3)
    channels = dit.config.audio_acoustic_hidden_dim

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dit.dtype)

    with torch.no_grad():
        velocity: torch.Tensor = dit(
            hidden_states=noise(2, 30, channels),
            timestep=torch.tensor([0.9, 0.4], dtype=dit.dtype),
            timestep_r=torch.tensor([0.9, 0.4], dtype=dit.dtype),
            encoder_hidden_states=noise(2, 7, dit.config.encoder_hidden_size),
            context_latents=noise(2, 30, 2 * channels),
            return_dict=False,
            **kwargs,
        )[0]
    return velocity


def beside(checkpoints: Path, path: Path, scale: float, metadata: dict[str, Any] | None = None) -> torch.Tensor:
    """The output of diffusers with the LoRA as separate layers, loaded by its own loader."""
    from diffusers.loaders import AceStepLoraLoaderMixin  # noqa: PLC0415 - diffusers loads its loaders lazily

    dit = load(checkpoints)
    state, _ = AceStepLoraLoaderMixin.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, return_lora_metadata=True
    )
    dit.load_lora_adapter(state, metadata=metadata)
    return run_dit(dit, attention_kwargs={"scale": scale})


def with_magnitudes(dit: Any, tensors: Shared) -> Shared:
    """The tensors of a DoRA: beside a LoRA's, the length of each row of a changed weight, not that of the DiT's own."""
    generator = torch.Generator().manual_seed(5)
    magnitudes = {}
    for layer in LAYERS:
        lengths = dit.get_submodule(layer).weight.norm(dim=1)
        magnitudes[f"transformer.{layer}.lora_magnitude_vector"] = lengths * (
            0.5 + torch.rand(lengths.shape, generator=generator)
        )
    return {**tensors, **magnitudes}


@pytest.mark.usefixtures("untouched")
class TestMerged:
    @pytest.mark.parametrize("key", [diffusers_key, peft_key], ids=["diffusers", "ACE-Step"])
    @pytest.mark.parametrize("scale", [1.0, 0.8, -0.5, 0.0])
    def test_it_gives_what_diffusers_gives_with_the_lora_layers_added(
        self, dit: Any, tiny_checkpoints: Path, tmp_path: Path, key: Callable[[str, str], str], scale: float
    ) -> None:
        path = write_lora(tmp_path / "jazz.safetensors", random_lora(key=key))
        merged = run_dit(AdaptedModelCache().adapted(dit, Lora.at(path, scale, alpha=RANK)))
        torch.testing.assert_close(merged, beside(tiny_checkpoints, path, scale), atol=1e-5, rtol=0)
        assert torch.equal(merged, run_dit(dit)) is (scale == 0)

    def test_the_scale_that_peft_writes_beside_counts(self, dit: Any, tiny_checkpoints: Path, tmp_path: Path) -> None:
        path = write_peft_lora(tmp_path, alpha=3 * RANK)
        plain = write_lora(tmp_path / "plain.safetensors", random_lora(key=peft_key))
        merged = run_dit(AdaptedModelCache().adapted(dit, Lora.at(path, 0.5)))
        torch.testing.assert_close(merged, beside(tiny_checkpoints, plain, 1.5), atol=1e-5, rtol=0)

    def test_the_scale_in_diffusers_header_counts(self, dit: Any, tiny_checkpoints: Path, tmp_path: Path) -> None:
        config = {"transformer.r": RANK, "transformer.lora_alpha": 2, "transformer.target_modules": list(LAYERS)}
        path = write_lora(tmp_path / "jazz.safetensors", lora_adapter_metadata=json.dumps(config))
        merged = run_dit(AdaptedModelCache().adapted(dit, Lora.at(path, 0.8)))
        torch.testing.assert_close(merged, beside(tiny_checkpoints, path, 0.8, config), atol=1e-5, rtol=0)

    def test_several_are_added_up_and_each_is_what_it_is_alone(self, dit: Any, tmp_path: Path) -> None:
        jazz = Lora.at(write_lora(tmp_path / "jazz.safetensors", random_lora(strength=0.03)), 0.7)
        blues = Lora.at(write_lora(tmp_path / "blues.safetensors", random_lora(seed=1, strength=0.03)), -0.4)
        dora = Lora.at(write_lora(tmp_path / "dora.safetensors", with_magnitudes(dit, random_lora(seed=2))), 0.5)
        base, *alone = (
            AdaptedModelCache().adapted(dit, *loras).state_dict() for loras in ((), (jazz,), (blues,), (dora,))
        )
        together = AdaptedModelCache().adapted(dit, jazz, blues, dora).state_dict()
        turned = AdaptedModelCache().adapted(dit, dora, blues, jazz).state_dict()
        for name, weight in together.items():
            expected = base[name] + sum(each[name] - base[name] for each in alone)
            torch.testing.assert_close(weight, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(turned[name], expected, atol=1e-5, rtol=0)

    def test_a_dora_gives_what_diffusers_gives_with_its_layers_added(
        self, dit: Any, tiny_checkpoints: Path, tmp_path: Path
    ) -> None:
        config = {"r": RANK, "lora_alpha": 6, "use_dora": True, "target_modules": list(LAYERS)}
        header = json.dumps({f"transformer.{name}": value for name, value in config.items()})
        tensors = with_magnitudes(dit, random_lora())
        path = write_lora(tmp_path / "jazz.safetensors", tensors, lora_adapter_metadata=header)
        merged = run_dit(AdaptedModelCache().adapted(dit, Lora.at(path, 1)))
        added = {f"transformer.{name}": value for name, value in config.items()}
        torch.testing.assert_close(merged, beside(tiny_checkpoints, path, 1, added), atol=1e-4, rtol=0)
        assert torch.equal(run_dit(AdaptedModelCache().adapted(dit, Lora.at(path, 0))), run_dit(dit))

    def test_a_magnitude_may_be_of_columns(self, dit: Any, tmp_path: Path) -> None:
        """LyCORIS wrote those first."""
        layer = "layers.0.mlp.up_proj"
        lengths = torch.rand(1, 32) + 0.5
        tensors = {**random_lora([layer], key=down_up_key), f"{layer}.dora_scale": lengths}
        weight = (
            AdaptedModelCache()
            .adapted(dit, Lora.at(write_lora(tmp_path / "jazz.safetensors", tensors), 1))
            .get_submodule(layer)
            .weight
        )
        torch.testing.assert_close(weight.norm(dim=0, keepdim=True), lengths)

    def test_a_lokr_changes_linear_layers_and_convolutions(self, dit: Any, tmp_path: Path) -> None:
        """LyCORIS reads the weight of a convolution as a matrix of outputs and all the rest."""
        tensors: Shared = {}
        for name, (outputs, inputs) in {"layers_0_mlp_up_proj": (64, 32), "proj_in_1": (32, 24)}.items():
            tensors |= {
                f"lycoris_{name}.lokr_w1": torch.randn(4, 4),
                f"lycoris_{name}.lokr_w2_a": torch.randn(outputs // 4, 2),
                f"lycoris_{name}.lokr_w2_b": torch.randn(2, inputs // 4),
                f"lycoris_{name}.alpha": torch.tensor(3.0),
            }
        adapted = AdaptedModelCache().adapted(dit, Lora.at(write_lora(tmp_path / "a.safetensors", tensors), 0.5))
        for name, layer in {"layers_0_mlp_up_proj": "layers.0.mlp.up_proj", "proj_in_1": "proj_in_conv"}.items():
            key, weight = f"lycoris_{name}.lokr_", dit.get_submodule(layer).weight
            change = torch.kron(tensors[f"{key}w1"], tensors[f"{key}w2_a"] @ tensors[f"{key}w2_b"])
            expected = weight + 0.5 * 1.5 * change.reshape(weight.shape)
            torch.testing.assert_close(adapted.get_submodule(layer).weight.data, expected)

    def test_what_is_left_is_a_plain_model(self, dit: Any, tmp_path: Path) -> None:
        adapted = AdaptedModelCache().adapted(dit, Lora.at(write_lora(tmp_path / "jazz.safetensors"), 1))
        assert type(adapted) is type(dit)
        assert [type(module) for module in adapted.modules()] == [type(module) for module in dit.modules()]
        assert list(adapted.state_dict()) == list(dit.state_dict())
        assert all(type(weight) is torch.nn.Parameter and not weight.requires_grad for weight in adapted.parameters())
        assert not {id(weight) for weight in adapted.parameters()} & {id(weight) for weight in dit.parameters()}

    def test_only_changed_weights_take_memory(self, dit: Any, tmp_path: Path) -> None:
        layer = "layers.1.cross_attn.to_v"
        cache = AdaptedModelCache()
        adapted = cache.adapted(dit, Lora.at(write_lora(tmp_path / "jazz.safetensors", random_lora([layer])), 1))
        places = {name: weight.data_ptr() for name, weight in dit.state_dict().items()}
        moved = {name for name, weight in adapted.state_dict().items() if weight.data_ptr() != places[name]}
        assert moved == {f"{layer}.weight"}
        assert cache.bytes == dit.get_submodule(layer).weight.nbytes

    def test_in_half_precision_the_sum_is_rounded_once(self, tiny_checkpoints: Path, tmp_path: Path) -> None:
        path = write_lora(tmp_path / "jazz.safetensors", random_lora(strength=0.03))
        exact = AdaptedModelCache().adapted(load(tiny_checkpoints).bfloat16().float(), Lora.at(path, 0.7))
        adapted = AdaptedModelCache().adapted(load(tiny_checkpoints).bfloat16(), Lora.at(path, 0.7))
        for name, weight in adapted.state_dict().items():
            assert torch.equal(weight, exact.state_dict()[name].bfloat16()), name

    def test_a_caller_in_inference_mode_gets_weights_that_can_be_moved_later(self, dit: Any, tmp_path: Path) -> None:
        lora = Lora.at(write_lora(tmp_path / "jazz.safetensors"), 1)
        with torch.inference_mode():
            adapted = AdaptedModelCache().adapted(dit, lora)
        assert not any(weight.is_inference() for weight in adapted.parameters())

    def test_moving_the_adapted_one_leaves_the_base_where_it_is(self, dit: Any, tmp_path: Path) -> None:
        AdaptedModelCache().adapted(dit, Lora.at(write_lora(tmp_path / "jazz.safetensors"), 1)).to("meta")
        assert {weight.device.type for weight in dit.parameters()} == {"cpu"}


@pytest.mark.parametrize("offloaded", [False, True])
def test_an_adapted_dit_of_an_offloaded_base_counts_with_all_its_weights(
    tiny_checkpoints: Path, tmp_path: Path, *, offloaded: bool
) -> None:
    settings = EngineSettings(checkpoint_dir=tiny_checkpoints, device="cpu")
    (runner,) = open_runtime(settings).scheduler._runners.values()
    if offloaded:
        runner.offload(ModuleSwapper(torch.device("cpu")))
    assert runner.lora_bytes == 0
    path = write_lora(tmp_path / "lora.safetensors")
    adapted = runner.denoiser((Lora.at(path, 1.0),)).dit.dit
    changed, whole = runner._loras.bytes, weight_bytes(adapted)
    assert 0 < changed < whole
    assert runner.lora_bytes == (whole if offloaded else changed)
    runner.free_caches()
    assert runner.lora_bytes == 0


def test_hooks_of_the_base_are_not_called_for_the_adapted_one(dit: Any, tmp_path: Path) -> None:
    """They move the base's weights, and would run the base in its stead."""
    lora = Lora.at(write_lora(tmp_path / "jazz.safetensors"), 1)
    expected = run_dit(AdaptedModelCache().adapted(dit, lora))
    called = []
    dit.register_forward_pre_hook(lambda *_: called.append("hook"))
    add_hook_to_module(dit, ModelHook())
    assert torch.equal(run_dit(AdaptedModelCache().adapted(dit, lora)), expected)
    assert called == []
    assert not torch.equal(run_dit(dit), expected)
    assert called == ["hook"]


class TestCache:
    def test_the_same_question_gets_the_same_object(self, dit: Any, tmp_path: Path) -> None:
        cache = AdaptedModelCache()
        first = write_lora(tmp_path / "1/jazz.safetensors")
        linked, copied = tmp_path / "linked.safetensors", write_lora(tmp_path / "2/copied.safetensors")
        os.link(first, linked)
        adapted = cache.adapted(dit, Lora.at(first, 0.8))
        assert cache.adapted(dit, Lora.at(linked, 0.8)) is adapted
        assert cache.adapted(dit, Lora.at(copied, 0.8)) is adapted
        assert Lora.at(linked, 0.8) == Lora.at(copied, 0.8)

    def test_other_content_another_scale_and_another_base_are_other_questions(
        self, dit: Any, tiny_checkpoints: Path, tmp_path: Path
    ) -> None:
        cache = AdaptedModelCache(max_models=4)
        path = write_lora(tmp_path / "jazz.safetensors")
        other = write_lora(tmp_path / "blues.safetensors", random_lora(seed=1))
        other_base = load(tiny_checkpoints)
        adapted = [
            cache.adapted(dit, Lora.at(path, 0.8)),
            cache.adapted(dit, Lora.at(path, 0.7)),
            cache.adapted(dit, Lora.at(other, 0.8)),
            cache.adapted(other_base, Lora.at(path, 0.8)),
        ]
        assert len(set(map(id, adapted))) == 4
        assert cache.adapted(dit, Lora.at(path, 0.8)) is adapted[0]

    def test_a_file_that_was_written_anew_is_another_lora(self, tmp_path: Path) -> None:
        path = write_peft_lora(tmp_path, alpha=4)
        before = Lora.at(path, 1)
        write_peft_lora(tmp_path, alpha=16)
        config_changed = Lora.at(path, 1)
        write_peft_lora(tmp_path, alpha=16, tensors=random_lora(seed=1))
        assert len({before, config_changed, Lora.at(path, 1)}) == 3

    def test_the_least_recently_used_one_leaves(self, dit: Any, tmp_path: Path) -> None:
        path = write_lora(tmp_path / "jazz.safetensors")
        one, two, three = (Lora.at(path, scale) for scale in (1, 2, 3))
        cache = AdaptedModelCache(max_models=2)
        first, second = cache.adapted(dit, one), cache.adapted(dit, two)
        assert cache.adapted(dit, one) is first
        cache.adapted(dit, three)
        assert cache.adapted(dit, one) is first
        assert cache.adapted(dit, two) is not second

    def test_it_can_be_emptied(self, dit: Any, tmp_path: Path) -> None:
        cache = AdaptedModelCache()
        lora = Lora.at(write_lora(tmp_path / "jazz.safetensors"), 1)
        adapted = cache.adapted(dit, lora)
        cache.clear()
        assert cache.bytes == 0
        assert cache.adapted(dit, lora) is not adapted

    def test_threads_that_ask_at_once_get_one_object(self, dit: Any, tmp_path: Path) -> None:
        cache = AdaptedModelCache()
        lora = Lora.at(write_lora(tmp_path / "jazz.safetensors"), 1)
        with ThreadPoolExecutor(4) as threads:
            adapted = list(threads.map(lambda _: cache.adapted(dit, lora), range(8)))
        assert len(set(map(id, adapted))) == 1

    def test_a_cache_for_none_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="max_models must be 1 or more"):
            AdaptedModelCache(max_models=0)


@pytest.mark.usefixtures("untouched")
class TestRefused:
    def test_a_lora_for_a_model_of_another_width(self, dit: Any, tmp_path: Path) -> None:
        layer = "layers.0.self_attn.to_q"
        tensors = {diffusers_key(layer, "A"): torch.ones(RANK, 64), diffusers_key(layer, "B"): torch.ones(64, RANK)}
        with pytest.raises(InputUnreadable) as caught:
            AdaptedModelCache().adapted(dit, Lora.at(write_lora(tmp_path / "jazz.safetensors", tensors), 1))
        assert str(caught.value) == (
            "the LoRA does not fit this model: layers.0.self_attn.to_q has weights of 32 x 32, and the LoRA's are "
            "64 x 64; use one that was trained for it, or name the LoRA's own model in the field model"
        )

    @pytest.mark.parametrize(
        "layer", ["layers.2.self_attn.to_q", "layers.0.self_attn", "proj_in_conv", "text_encoder.q"]
    )
    def test_a_lora_for_layers_that_the_model_does_not_have(self, dit: Any, tmp_path: Path, layer: str) -> None:
        tensors = {diffusers_key(layer, "A"): torch.ones(RANK, 32), diffusers_key(layer, "B"): torch.ones(32, RANK)}
        with pytest.raises(InputUnreadable, match=f"has no linear layer '{layer}'; use one that was trained for it"):
            AdaptedModelCache().adapted(dit, Lora.at(write_lora(tmp_path / "jazz.safetensors", tensors), 1))

    def test_a_bad_file_does_not_evict_the_cached_one(self, dit: Any, tmp_path: Path) -> None:
        cache = AdaptedModelCache()
        good, bad = Lora.at(write_lora(tmp_path / "jazz.safetensors"), 1), tmp_path / "bad.safetensors"
        adapted = cache.adapted(dit, good)
        bad.write_bytes(b"no weights")
        with pytest.raises(InputUnreadable):
            cache.adapted(dit, Lora.at(bad, 1))
        assert cache.adapted(dit, good) is adapted

    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(InputUnreadable, match=r"^the LoRA's file cannot be read \(FileNotFoundError\)$"):
            Lora.at(tmp_path / "none.safetensors", 1)
