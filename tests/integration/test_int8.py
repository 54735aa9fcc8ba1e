# SPDX-License-Identifier: Apache-2.0
"""Weights in int8, by torchao: how far songs and logits move, LoRAs beside them, offloading, and the memory they take.

Tiny real models with random weights. The error is against the same model in float32, beside that of bfloat16, which is
how models are published.
"""

import asyncio
import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torchao.quantization
import transformers
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code
from transformers import AutoModelForCausalLM

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.adapters import PlannerSupervisor, RendererSupervisor
from acestep_consumer.engine.messages import Configure, ConfigurePlanner, FromEngine
from acestep_consumer.engine.planner.loading import LmUnusable, _cache_tokens
from acestep_consumer.engine.planner.loading import load as load_planner
from acestep_consumer.engine.planner.transformers_backend import load as load_lm
from acestep_consumer.engine.process import EngineProcess
from acestep_consumer.engine.renderer import quantization
from acestep_consumer.engine.renderer.checkpoints.checkpoint_check import check_checkpoints
from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError
from acestep_consumer.engine.renderer.denoising.packed_dit import PackedDit
from acestep_consumer.engine.renderer.lora import AdaptedModelCache, Lora
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.offload import ModuleSwapper
from acestep_consumer.engine.renderer.quantization import (
    dequantized,
    is_quantized,
    quantize,
    replace_tensors,
    weight_bytes,
)
from acestep_consumer.engine.renderer.quiet_imports import quietly
from acestep_consumer.engine.renderer.startup import open_runtime
from acestep_consumer.engine.testing import tiny_checkpoint, tiny_lm
from tests.support.loras import random_lora, write_lora
from tests.support.waiting import WITHIN_S

WIDTH, CHANNELS = tiny_checkpoint._WIDTH, tiny_checkpoint._LATENT_CHANNELS


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_checkpoint.write(folder)
    tiny_lm.write(folder)
    return folder


@pytest.fixture
def dit(checkpoints: Path) -> Any:
    folder = checkpoints / tiny_checkpoint.TURBO / "transformer"
    return AceStepTransformer1DModel.from_pretrained(folder).eval().requires_grad_(requires_grad=False)


def in_int8(model: Any) -> Any:
    quantize(model, "int8")
    return model


def runner_of(checkpoints: Path, quantization: str | None) -> ModelRunner:
    settings = EngineSettings.model_validate(
        {"checkpoint_dir": checkpoints, "device": "cpu", "quantization": quantization}
    )
    (runner,) = open_runtime(settings).scheduler._runners.values()
    return runner


def planner_in_int8(checkpoints: Path) -> ConfigurePlanner:
    options: dict[str, Any] = {"model": tiny_lm.NAME, "backend": "pt", "checkpoint_dir": checkpoints}
    return ConfigurePlanner(memory_gb=2, device="cpu", quantization="int8", **options)


@torch.no_grad()
def song_of(dit: Any, steps: int = 8, packed: PackedDit | None = None) -> torch.Tensor:
    """Latents of a song of 30 frames, denoised in so many steps of plain Euler; float32."""
    generator = torch.Generator().manual_seed(1)
    packed = packed or PackedDit(dit)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dit.dtype)

    conditions = packed.conditions([noise(7, WIDTH)])
    pack = packed.lay_out([30], conditions)
    latents, context = noise(30, CHANNELS), noise(30, 2 * CHANNELS)
    for step in range(steps):
        now, then = 1 - step / steps, 1 - (step + 1) / steps
        times = torch.tensor([now, 0.0], dtype=dit.dtype)
        velocity = packed.velocities(pack, latents, context, conditions[0].kv, times)
        latents = (latents.float() - (now - then) * velocity.float()).to(dit.dtype)
    return latents.float()


def error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def test_a_song_in_int8_is_as_near_to_float32_as_one_in_bfloat16(dit: Any) -> None:
    exact = song_of(dit)
    half = copy.deepcopy(dit).to(torch.bfloat16)
    in_bfloat16, in_bytes = error_of(song_of(half), exact), error_of(song_of(in_int8(half)), exact)
    rounding_alone = error_of(song_of(in_int8(dit)), exact)
    assert 1e-4 < in_bfloat16 < 0.015
    assert in_bytes / in_bfloat16 < 1.5
    assert rounding_alone < 0.005


def test_only_the_layers_of_the_transformer_are_quantized_and_each_weight_within_half_a_step(dit: Any) -> None:
    before = {name: weight.clone() for name, weight in dit.named_parameters()}
    in_int8(dit)
    quantized = {name for name, weight in dit.named_parameters() if is_quantized(weight)}
    linear = {f"{name}.weight" for name, module in dit.named_modules() if isinstance(module, nn.Linear)}
    assert quantized == {name for name in linear if name.startswith("layers.")}
    for name in quantized:
        original = before[name]
        step = original.abs().amax(dim=1, keepdim=True) / 127
        assert ((dequantized(dit.get_parameter(name)) - original).abs() <= 0.51 * step).all(), name
    for name in before.keys() - quantized:
        assert torch.equal(dit.get_parameter(name), before[name])


def test_a_worker_in_int8_renders_a_song_and_holds_fewer_bytes(checkpoints: Path) -> None:
    plain, small = runner_of(checkpoints, None), runner_of(checkpoints, "int8")
    layers = sum(
        module.weight.nbytes for module in plain.parts.dit.dit.layers.modules() if isinstance(module, nn.Linear)
    )
    saved = weight_bytes(plain.parts.dit.dit) - weight_bytes(small.parts.dit.dit)
    assert 0.5 * layers < saved < 0.75 * layers  # of float32; the scales of rows this short weigh much
    assert small.render_warm_up() == pytest.approx(plain.render_warm_up(), rel=0.05)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning"
)  # torch's compiler uses what torch has deprecated
@pytest.mark.parametrize("published", [None, torch.float32, torch.bfloat16])
def test_a_compiled_layer_in_int8_is_a_matrix_product_with_scales_in_float32(
    published: torch.dtype | None,
) -> None:
    """``published``: with scales of this precision; None: by the setting."""
    layer = nn.Linear(64, 32).to(torch.bfloat16).requires_grad_(requires_grad=False)
    model = nn.ModuleDict({"layers": layer})
    weight: Any
    if published:
        torchao.quantization.quantize_(model, quantization._config())
        weight = layer.weight
        weight.scale = weight.scale.to(published)
    quantize(model, None if published else "int8")
    activations = torch.randn(1, 9, 64, dtype=torch.bfloat16)
    with torch.inference_mode(), fresh_cache():
        compiled = torch.compile(layer, dynamic=True)
        found, code = run_and_get_code(compiled, activations)
    # Its kernel for CUDA has no tensor cores: the DiT's step took seconds.
    assert "_weight_int8pack_mm" not in "".join(code)
    weight = layer.weight
    product = (activations @ weight.qdata.T.to(torch.bfloat16)).float()
    exact = (product * weight.scale.T + layer.bias).to(torch.bfloat16)
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0.01)
    assert torch.equal(layer(activations), exact)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # as above
def test_a_compiled_layer_in_int8_comes_from_the_cache_unless_its_product_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As another version of the worker may change it: both have the same folder of kernels."""
    layer = nn.Linear(64, 32).requires_grad_(requires_grad=False)
    in_int8(nn.ModuleDict({"layers": layer}))
    activations = torch.randn(1, 9, 64)

    def started() -> tuple[torch.Tensor, int]:
        torch._dynamo.reset()
        counters.clear()
        with torch.inference_mode():
            product = torch.compile(layer, dynamic=True)(activations)
        return product, counters["aot_autograd"]["autograd_cache_hit"]

    product = quantization.scaled_product
    with fresh_cache():
        (first, hits), (second, more_hits) = started(), started()
        monkeypatch.setattr(quantization, "scaled_product", lambda *given: 2 * product(*given))
        third, _ = started()
    assert (hits, more_hits) == (0, 1)
    assert torch.equal(second, first)
    assert torch.equal(third, 2 * first)


def test_layers_whose_activations_are_in_int8_too_stay_torchaos() -> None:
    layers = [nn.Linear(64, 32, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    models = [nn.ModuleDict({"layers": layer}) for layer in layers]
    for model in models:
        torchao.quantization.quantize_(model, torchao.quantization.Int8DynamicActivationInt8WeightConfig())
    activations = torch.randn(9, 64)
    theirs = layers[0](activations)
    quantize(models[1], None)
    assert torch.equal(layers[1](activations), theirs)
    assert not torch.allclose(theirs, activations @ dequantized(layers[1].weight).T, rtol=0, atol=1e-4)


def test_factors_of_the_activations_are_in_a_weight_that_is_dequantized() -> None:
    """As a checkpoint by AWQ or SmoothQuant has them: a LoRA is added to weights that work without them."""
    layer = nn.Linear(64, 32, bias=False).requires_grad_(requires_grad=False)
    model = nn.ModuleDict({"layers": layer})
    torchao.quantization.quantize_(model, quantization._config())
    weight: Any = layer.weight
    weight.act_pre_scale = torch.rand(64) + 0.5
    quantize(model, None)
    activations = torch.randn(9, 64)
    torch.testing.assert_close(activations @ dequantized(weight).T, layer(activations), rtol=0, atol=1e-5)


def test_another_version_of_torchao_is_told_as_that_where_weights_were_published_in_int8(
    dit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchao.quantization.quantize_(dit, quantization._config(), filter_fn=quantization._is_in_a_layer)
    monkeypatch.delattr(torchao.quantization, "Int8Tensor")
    with pytest.raises(quantization.QuantizationUnavailable, match=r"torchao.*version that does not fit.*\[int8\]"):
        quantize(dit, None)


def test_a_compiled_model_in_int8_gives_the_same_velocities(dit: Any) -> None:
    in_int8(dit)
    eager = song_of(dit, steps=1)
    packed = PackedDit(dit)
    for block in packed._blocks:
        block.compile(dynamic=True, backend="aot_eager")
    torch.testing.assert_close(song_of(dit, steps=1, packed=packed), eager, atol=1e-5, rtol=0)


def test_a_lora_on_weights_in_int8_changes_them_as_much_as_on_the_published_ones(dit: Any, tmp_path: Path) -> None:
    lora = Lora.at(write_lora(tmp_path / "jazz.safetensors", random_lora()), 1.0, alpha=None)
    plain = dict(AdaptedModelCache().adapted(copy.deepcopy(dit), lora).named_parameters())
    original = {name: weight.clone() for name, weight in dit.named_parameters()}
    in_int8(dit)
    quantized = {name: dequantized(weight) for name, weight in dit.named_parameters()}
    adapted = AdaptedModelCache().adapted(dit, lora)
    changed = 0
    for name, weight in adapted.named_parameters():
        if is_quantized(weight):
            assert torch.equal(dequantized(weight), quantized[name])
        elif name.startswith("layers.") and weight.ndim > 1 and not torch.equal(weight, original[name]):
            changed += 1
            torch.testing.assert_close(weight - quantized[name], plain[name] - original[name], atol=1e-6, rtol=0)
    assert changed
    assert song_of(adapted, steps=2).isfinite().all()


def test_a_compiled_model_in_int8_can_be_moved(dit: Any) -> None:
    """As offloading does between two uses. torch may refuse to exchange weights that a compiled model refers to."""
    in_int8(dit)
    packed = PackedDit(dit)
    for block in packed._blocks:
        block.compile(dynamic=True, backend="aot_eager")
    before = song_of(dit, steps=1, packed=packed)
    weights = [weight.data_ptr() for weight in dit.parameters() if not is_quantized(weight)]
    replace_tensors(dit, torch.clone)
    moved = [weight.data_ptr() for weight in dit.parameters() if not is_quantized(weight)]
    assert not set(moved) & set(weights)
    assert all(is_quantized(module.weight) for module in dit.layers.modules() if isinstance(module, nn.Linear))
    assert torch.equal(song_of(dit, steps=1, packed=packed), before)


def test_an_offloaded_model_in_int8_comes_back_unchanged(dit: Any) -> None:
    in_int8(dit)
    before = song_of(dit, steps=1)
    swapper = ModuleSwapper(torch.device("cpu"))
    swapper.register(dit)
    swapper.load(dit)
    swapper.unload()
    assert torch.equal(song_of(dit, steps=1), before)


@torch.no_grad()
def test_logits_of_the_language_model_in_int8_are_close_and_its_head_is_untouched(checkpoints: Path) -> None:
    folder = str(checkpoints / tiny_lm.NAME)
    exact, half = (load_lm(folder, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    small = load_lm(folder, "cpu", torch.bfloat16, "int8")
    ids = torch.arange(5, 60)[None]
    logits = [model(input_ids=ids).logits for model in (exact, half, small)]
    assert error_of(logits[2], logits[0]) < min(0.05, 4 * error_of(logits[1], logits[0]))
    assert not is_quantized(small.get_output_embeddings().weight)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


def test_the_memory_that_int8_frees_is_the_key_value_caches(checkpoints: Path) -> None:
    folder = str(checkpoints / tiny_lm.NAME)
    plain, small = load_lm(folder, "cpu", torch.float32), load_lm(folder, "cpu", torch.float32, "int8")
    freed = weight_bytes(plain) - weight_bytes(small)
    assert freed > 0
    config = plain.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    memory_gb = 1.0
    assert _cache_tokens(small, memory_gb) - _cache_tokens(plain, memory_gb) == pytest.approx(freed / token, abs=1)


def test_a_planner_in_int8_starts_on_transformers(checkpoints: Path) -> None:
    assert load_planner(planner_in_int8(checkpoints)).report.backend == "pt"


STARTS: dict[str, Callable[[Path], object]] = {
    "renderer": lambda checkpoints: runner_of(checkpoints, "int8"),
    "planner": lambda checkpoints: load_planner(planner_in_int8(checkpoints)),
    "planner on vLLM": lambda _: quantization.config_json(),
}
REFUSED = pytest.raises(
    (CheckpointError, LmUnusable, quantization.QuantizationUnavailable),
    match=r"need torchao.*pip install 'acestep-consumer\[int8\]'",
)


@pytest.mark.parametrize("start", STARTS)
def test_without_torchao_the_start_says_what_to_install(
    start: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    with REFUSED:
        STARTS[start](checkpoints)


def takes_nothing() -> None:
    """A configuration of torchao without the settings that are wanted."""


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("old", [None, takes_nothing], ids=["without its configuration", "with another one"])
def test_a_torchao_of_another_version_is_refused_at_the_start(
    start: str, old: Callable[[], None] | None, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torchao.quantization, "Int8WeightOnlyConfig")
    if old is not None:
        monkeypatch.setattr(torchao.quantization, "Int8WeightOnlyConfig", old, raising=False)
    with REFUSED:
        STARTS[start](checkpoints)


@pytest.fixture(scope="module")
def published_in_int8(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models as torchao, transformers and diffusers save them quantized."""
    config = quantization._config()
    folder = tmp_path_factory.mktemp("published-in-int8")
    names = (tiny_checkpoint.TURBO, tiny_lm.NAME)
    for name in names:
        shutil.copytree(checkpoints / name, folder / name)
    dit_folder, lm_folder = folder / names[0] / "transformer", folder / names[1]
    with quietly():
        dit = AceStepTransformer1DModel.from_pretrained(dit_folder, quantization_config=diffusers.TorchAoConfig(config))
        lm: Any = AutoModelForCausalLM.from_pretrained(
            lm_folder, quantization_config=transformers.TorchAoConfig(config)
        )
        for model, place in ((dit, dit_folder), (lm, lm_folder)):
            for weights in place.glob("*.safetensors"):
                weights.unlink()
            model.save_pretrained(place)
    return folder


@pytest.mark.usefixtures("fresh_processes")
@pytest.mark.parametrize("module", [RendererSupervisor.module, PlannerSupervisor.module])
async def test_models_that_were_published_in_int8_load_without_the_setting(
    module: str, published_in_int8: Path
) -> None:
    lm = ConfigurePlanner(model=tiny_lm.NAME, backend="pt", checkpoint_dir=published_in_int8, memory_gb=2, device="cpu")
    dit = EngineSettings(checkpoint_dir=published_in_int8, device="cpu", encoders=1)
    process = await EngineProcess.start(module, {})
    process.send(lm if module == PlannerSupervisor.module else Configure(settings=dit))
    ended: FromEngine | None = None
    async with asyncio.timeout(WITHIN_S):
        async for message in process.messages():
            if message.kind in {"ready", "unusable"}:
                ended = message
                break
    await process.end()
    assert ended is not None
    assert ended.kind == "ready", ended


def test_weights_that_were_published_in_int8_stay_as_they_are_with_the_setting(dit: Any) -> None:
    published = {name: dequantized(weight) for name, weight in in_int8(dit).named_parameters()}
    again = {name: dequantized(weight) for name, weight in in_int8(dit).named_parameters()}
    assert all(torch.equal(again[name], weight) for name, weight in published.items())


def test_models_that_were_published_in_int8_are_refused_where_torchao_is_missing(
    published_in_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EngineSettings(checkpoint_dir=published_in_int8, device="cpu")
    check_checkpoints(settings)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(CheckpointError, match=r"is quantized by torchao, which is missing: pip install .*\[int8\]"):
        check_checkpoints(settings)
    lm = ConfigurePlanner(model=tiny_lm.NAME, backend="pt", checkpoint_dir=published_in_int8, memory_gb=2, device="cpu")
    with pytest.raises(LmUnusable, match=r"is quantized by torchao, which is missing: pip install .*\[int8\]"):
        load_planner(lm)
