# SPDX-License-Identifier: Apache-2.0
"""What a LoRA's file says: one meaning in every spelling, its scale from wherever it stands, errors that say what."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acestep_consumer.domain.errors import InputUnreadable
from acestep_consumer.engine.renderer.lora_file import Delta, KroneckerDelta, read_lora
from tests.support.loras import (
    LAYERS,
    RANK,
    comfyui_key,
    diffusers_key,
    down_up_key,
    kohya_key,
    peft_key,
    random_lora,
    write_lora,
    write_peft_lora,
)

Q = "layers.0.self_attn.to_q"


def one(path: Path) -> Delta:
    (delta,) = read_lora(path)
    assert isinstance(delta, Delta)
    return delta


def complaint(path: Path) -> str:
    with pytest.raises(InputUnreadable) as caught:
        read_lora(path)
    assert str(path.parent) not in str(caught.value)
    return str(caught.value)


def pair(layer: str = Q, key: Callable[[str, str], str] = diffusers_key) -> dict[str, torch.Tensor]:
    return random_lora([layer], key=key)


class TestSpellings:
    @pytest.mark.parametrize(
        "key",
        [
            diffusers_key,
            peft_key,
            down_up_key,
            lambda layer, side: f"{layer}.lora_{side}.weight",
            lambda layer, side: f"base_model.model.decoder.{layer}.lora_{side}.default.weight",
            lambda layer, side: f"diffusion_model.{layer}.lora.{'down' if side == 'A' else 'up'}.weight",
            lambda layer, side: f"{layer}.lora_linear_layer.{'down' if side == 'A' else 'up'}.weight",
            comfyui_key,
            kohya_key,
            lambda layer, side: f"_forward_module.decoder.{peft_key(layer, side)}",
        ],
        ids=[
            *("diffusers", "peft", "down and up", "no prefix", "named adapter", "dotted", "old"),
            *("ComfyUI", "kohya", "Lightning"),
        ],
    )
    def test_every_naming_scheme_means_the_same(self, tmp_path: Path, key: Callable[[str, str], str]) -> None:
        deltas = read_lora(write_lora(tmp_path / "a.safetensors", random_lora(key=key)), alpha=RANK)
        expected = random_lora()
        assert {delta.layer for delta in deltas} == set(LAYERS)
        for delta in deltas:
            assert isinstance(delta, Delta)
            assert torch.equal(delta.down, expected[diffusers_key(delta.layer, "A")])
            assert torch.equal(delta.up, expected[diffusers_key(delta.layer, "B")])
            assert delta.factor == 1

    @pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float32])
    def test_weights_stay_as_precise_as_they_are_in_the_file(self, tmp_path: Path, precision: torch.dtype) -> None:
        tensors = {name: tensor.to(precision) for name, tensor in pair().items()}
        delta = one(write_lora(tmp_path / "a.safetensors", tensors))
        assert delta.up.dtype == delta.down.dtype == precision


class TestScale:
    def test_alpha_in_the_file_counts_for_its_layer(self, tmp_path: Path) -> None:
        tensors = {**pair(key=down_up_key), f"{Q}.alpha": torch.tensor(2.0)}
        assert one(write_lora(tmp_path / "a.safetensors", tensors)).factor == 2 / RANK

    @pytest.mark.parametrize(
        ("config", "factor"),
        [
            ({"lora_alpha": 8}, 8 / RANK),
            ({"lora_alpha": 8, "use_rslora": True}, 8 / RANK**0.5),
            ({"lora_alpha": 8, "alpha_pattern": {"k_proj": 1, "self_attn.q_proj": 2, "q_proj": 3}}, 2 / RANK),
            ({"lora_alpha": 8, "alpha_pattern": {"^layers.0.self_attn.q_proj$": 2}}, 2 / RANK),
            ({"lora_alpha": 8, "alpha_pattern": {"j": 2, "attn.q_proj": 3}}, 8 / RANK),
        ],
    )
    def test_peft_writes_it_into_the_file_beside(self, tmp_path: Path, config: dict[str, Any], factor: float) -> None:
        weights = write_peft_lora(tmp_path, tensors=pair(key=peft_key), **{"alpha": 0, **config})
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **config}))
        assert one(weights).factor == pytest.approx(factor)

    def test_diffusers_writes_it_into_the_header(self, tmp_path: Path) -> None:
        header = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8})
        assert one(write_lora(tmp_path / "a.safetensors", pair(), lora_adapter_metadata=header)).factor == 8 / RANK

    def test_a_configuration_beside_a_file_of_another_name_is_another_files(self, tmp_path: Path) -> None:
        write_peft_lora(tmp_path, alpha=8)
        assert one(write_lora(tmp_path / "a.safetensors", pair())).factor == 1

    @pytest.mark.parametrize("config", [None, {"peft_type": "LORA", "r": RANK}])
    def test_one_of_peft_without_its_alpha_needs_that_of_the_request(
        self, tmp_path: Path, config: dict[str, Any] | None
    ) -> None:
        """Its factor is 1.5 or 2 as a rule: 1 would be a weaker LoRA than was trained."""
        path = write_lora(tmp_path / "adapter_model.safetensors", pair(key=peft_key))
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert complaint(path) == (
            "the LoRA's strength is unknown: its alpha is neither in the file nor in an adapter_config.json beside "
            "adapter_model.safetensors; put both there, or name lora.alpha in the request"
        )
        (delta,) = read_lora(path, alpha=12)
        assert delta.factor == 12 / RANK

    def test_the_requests_alpha_is_for_files_that_have_none(self, tmp_path: Path) -> None:
        tensors = {**pair(key=down_up_key), f"{Q}.alpha": torch.tensor(2.0)}
        (delta,) = read_lora(write_lora(tmp_path / "a.safetensors", tensors), alpha=12)
        assert delta.factor == 2 / RANK


class TestLokr:
    """Names and header as ACE-Step's second trainer writes them."""

    KEY = "lycoris_layers_0_cross_attn_o_proj"
    LAYER = "layers.0.cross_attn.to_out.0"

    def tensors(self, *names: str) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"w1": (4, 8), "w1_a": (4, 2), "w1_b": (2, 8), "w2": (8, 4), "w2_a": (8, 2), "w2_b": (2, 4)}
        return {f"{self.KEY}.lokr_{name}": torch.randn(shapes[name], generator=generator) for name in names}

    def delta(self, path: Path) -> KroneckerDelta:
        (delta,) = read_lora(path)
        assert isinstance(delta, KroneckerDelta)
        assert (delta.layer, delta.shape) == (self.LAYER, (32, 32))
        return delta

    @pytest.mark.parametrize(
        "names", [("w1", "w2_a", "w2_b"), ("w1_a", "w1_b", "w2"), ("w1_a", "w1_b", "w2_a", "w2_b")]
    )
    def test_the_change_is_the_kronecker_product_times_alpha_over_rank(
        self, names: tuple[str, ...], tmp_path: Path
    ) -> None:
        tensors = self.tensors(*names)
        delta = self.delta(write_lora(tmp_path / "a.safetensors", {**tensors, f"{self.KEY}.alpha": torch.tensor(3.0)}))
        left, right = (
            tensors[f"{self.KEY}.lokr_{side}"]
            if side in names
            else tensors[f"{self.KEY}.lokr_{side}_a"] @ tensors[f"{self.KEY}.lokr_{side}_b"]
            for side in ("w1", "w2")
        )
        assert delta.factor == 3 / 2
        expected = torch.ones(32, 32) + 0.5 * 1.5 * torch.kron(left, right)
        torch.testing.assert_close(delta.added_to(torch.ones(32, 32), 0.5), expected)

    def test_two_full_matrices_have_no_alpha(self, tmp_path: Path) -> None:
        tensors = {**self.tensors("w1", "w2"), f"{self.KEY}.alpha": torch.tensor(3.0)}
        assert self.delta(write_lora(tmp_path / "a.safetensors", tensors)).factor == 1

    @pytest.mark.parametrize(("rs_lora", "factor"), [(False, 3 / 2), (True, 3 / 2**0.5)])
    def test_the_header_says_alpha_where_the_file_does_not(
        self, *, rs_lora: bool, factor: float, tmp_path: Path
    ) -> None:
        header = json.dumps({"linear_dim": 2, "linear_alpha": 3, "rs_lora": rs_lora, "target_modules": ["o_proj"]})
        path = write_lora(tmp_path / "a.safetensors", self.tensors("w1", "w2_a", "w2_b"), lokr_config=header)
        assert self.delta(path).factor == pytest.approx(factor)

    def test_without_alpha_anywhere_its_strength_is_unknown(self, tmp_path: Path) -> None:
        path = write_lora(tmp_path / "a.safetensors", self.tensors("w1", "w2_a", "w2_b"))
        assert complaint(path).startswith("the LoRA's strength is unknown")

    @pytest.mark.parametrize("names", [("w1",), ("w1", "w2_a"), ("w2",)])
    def test_half_of_one_is_refused(self, names: tuple[str, ...], tmp_path: Path) -> None:
        path = write_lora(tmp_path / "a.safetensors", self.tensors(*names))
        assert complaint(path) == "the LoKr has only one of the two matrices of 'layers_0_cross_attn_o_proj'"


@pytest.mark.parametrize("key", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"])
def test_the_magnitude_of_a_dora_is_read_under_each_of_its_names(key: str, tmp_path: Path) -> None:
    magnitude = torch.arange(32) + 1.0
    delta = one(write_lora(tmp_path / "a.safetensors", {**pair(), f"transformer.{Q}.{key}": magnitude}))
    assert delta.magnitude is not None
    assert torch.equal(delta.magnitude, magnitude)


class TestRefused:
    def test_what_is_no_safetensors_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
        assert complaint(tmp_path / "a.safetensors") == "the LoRA is not a safetensors file, or it is damaged"
        assert complaint(tmp_path / "none.safetensors") == "the LoRA's file is gone"

    def test_a_file_that_was_cut_off(self, tmp_path: Path) -> None:
        path = write_lora(tmp_path / "a.safetensors")
        path.write_bytes(path.read_bytes()[:-100])
        assert complaint(path) == "the LoRA is not a safetensors file, or it is damaged"

    def test_one_without_weights(self, tmp_path: Path) -> None:
        assert complaint(write_lora(tmp_path / "a.safetensors", {})) == "the LoRA is empty: the file holds no weights"

    @pytest.mark.parametrize(
        ("key", "ending"),
        [
            (f"{Q}.weight", "is not part of a LoRA"),
            (f"{Q}.lokr_t2", "is not part of a LoRA: LoKr with Tucker decomposition is not supported"),
            (f"{Q}.hada_w1_a", "is not part of a LoRA: LoHa is not supported"),
            (f"{Q}.lora_B.bias", "is not part of a LoRA"),
            ("\x1b[2J" + "x" * 500, "is not part of a LoRA"),
        ],
    )
    def test_weights_of_another_kind_are_named(self, tmp_path: Path, key: str, ending: str) -> None:
        text = complaint(write_lora(tmp_path / "a.safetensors", {**pair(), key: torch.ones(2)}))
        assert text.endswith(ending)
        assert text.isprintable()
        assert len(text) < 200

    @pytest.mark.parametrize("side", ["A", "B"])
    def test_half_of_a_pair(self, tmp_path: Path, side: str) -> None:
        tensors = pair()
        del tensors[diffusers_key(Q, side)]
        assert (
            complaint(write_lora(tmp_path / "a.safetensors", tensors))
            == f"the LoRA has only one of the two matrices of '{Q}'"
        )

    def test_alpha_alone(self, tmp_path: Path) -> None:
        assert "only one of the two matrices" in complaint(
            write_lora(tmp_path / "a.safetensors", {f"{Q}.alpha": torch.ones(())})
        )

    @pytest.mark.parametrize("shape", [(3, 32), (4, 32, 1), (4,), (0, 32)])
    def test_a_pair_of_which_one_half_does_not_fit_the_other(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        tensors = {**pair(), diffusers_key(Q, "A"): torch.ones(shape)}
        text = complaint(write_lora(tmp_path / "a.safetensors", tensors))
        assert text == f"the LoRA's weights for '{Q}' do not fit each other"

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none(self, tmp_path: Path, value: float) -> None:
        tensors = pair()
        tensors[diffusers_key(Q, "B")][0, 0] = value
        assert complaint(write_lora(tmp_path / "a.safetensors", tensors)).endswith("are not all finite numbers")

    @pytest.mark.parametrize("precision", [torch.int8, torch.float8_e4m3fn, torch.bool])
    def test_numbers_of_a_kind_that_no_trainer_writes(self, tmp_path: Path, precision: torch.dtype) -> None:
        tensors = {name: tensor.to(precision) for name, tensor in pair().items()}
        assert "neither 16-bit nor 32-bit" in complaint(write_lora(tmp_path / "a.safetensors", tensors))

    def test_one_layer_under_two_names(self, tmp_path: Path) -> None:
        twice = {**pair(), **pair(key=down_up_key)}
        assert complaint(write_lora(tmp_path / "a.safetensors", twice)).endswith("under two names")
        twice = {**pair(), **pair(key=peft_key)}
        assert complaint(write_lora(tmp_path / "a.safetensors", twice)).endswith("in two ways")

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"peft_type": "LOKR"}, "'peft_type' is not LORA; other adapters are not supported"),
            ({"lora_alpha": "much"}, "'lora_alpha' is malformed"),
            ({"lora_alpha": float("inf")}, "'lora_alpha' is malformed"),
            ({"alpha_pattern": {"(a+)+b": 2}}, "is a regular expression: not supported"),
        ],
    )
    def test_a_configuration_that_cannot_be_followed(self, tmp_path: Path, config: dict[str, Any], said: str) -> None:
        assert complaint(write_peft_lora(tmp_path, **{"alpha": 8, **config})).endswith(said)

    def test_a_dora_without_its_magnitudes(self, tmp_path: Path) -> None:
        path = write_peft_lora(tmp_path, alpha=8, tensors=pair(key=peft_key), use_dora=True)
        assert complaint(path) == "the LoRA is a DoRA without the magnitude of 'layers.0.self_attn.q_proj'"

    @pytest.mark.parametrize("header", ["[1]", "{", "[" * 100_000])
    def test_a_header_that_is_no_configuration(self, tmp_path: Path, header: str) -> None:
        path = write_lora(tmp_path / "a.safetensors", pair(), lora_adapter_metadata=header)
        assert complaint(path) == "the LoRA's configuration cannot be read"
