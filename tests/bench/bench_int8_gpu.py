# SPDX-License-Identifier: Apache-2.0
"""Weights in int8 at full size: error of songs and logits beside bfloat16's, memory, and time.

    python -m tests.bench.bench_int8_gpu [--seconds 300] [--lm 1.7B] [--tiny]

Random weights in the shapes of the 2B DiT. A song is denoised in 8 steps in float32, bfloat16 and int8 (with bfloat16
around it) from the same noise, and decoded; each error is relative to float32. Then a step's time, compiled as in the
worker, the DiT's bytes, a LoRA's merge, and one round through RAM as offloading makes it. The language model's logits
are compared likewise; its time is `bench_planner_gpu --int8`'s to tell. ``--tiny`` tries the script out on a CPU.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from acestep_consumer.engine.renderer.checkpoints.checkpoint import _prepare
from acestep_consumer.engine.renderer.decoder.vae_decode import TileDecoder
from acestep_consumer.engine.renderer.denoising.packed_dit import PackedDit
from acestep_consumer.engine.renderer.lora import AdaptedModelCache, Lora
from acestep_consumer.engine.renderer.quantization import move, quantize, weight_bytes
from acestep_consumer.engine.testing import tiny_checkpoint
from tests.bench import full_size
from tests.bench.bench_planner_gpu import shape_of
from tests.bench.bench_renderer_gpu import timed

_STEPS = 8
_CONDITION = 700
_NOT_SHAPE = ("architectures", "model_type", "torch_dtype")


def main() -> int:
    arguments = _parser().parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = _pipeline(device, tiny=arguments.tiny)
    _prepare(pipeline)
    with torch.inference_mode():
        tell("songs", **songs(pipeline, 5 if arguments.tiny else arguments.seconds))
        tell("logits", **logits("tiny" if arguments.tiny else arguments.lm, device))
    for name, method in (("bfloat16", None), ("int8", "int8")):
        dit = copy.deepcopy(pipeline.transformer)
        tell("dit", weights=name, **costs(dit, method, 5 if arguments.tiny else arguments.seconds, tiny=arguments.tiny))
    return 0


def tell(bench: str, **found: Any) -> None:
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}
    sys.stdout.write(json.dumps({"bench": bench, **rounded}) + "\n")
    sys.stdout.flush()


def songs(pipeline: Any, seconds: int) -> dict[str, Any]:
    """Relative errors of latents and waveform against float32."""
    exact = copy.deepcopy(pipeline.transformer).float()
    plain = pipeline.transformer
    small = copy.deepcopy(plain)
    quantize(small, "int8")
    alone = copy.deepcopy(exact)
    quantize(alone, "int8")
    dits = {"float32": exact, "bfloat16": plain, "int8": small, "int8_in_float32": alone}
    made = {name: song(dit, seconds) for name, dit in dits.items()}
    decoder = TileDecoder(pipeline.vae)
    sound = {name: decoder.decode([latents.to(pipeline.vae.dtype)], 1)[0].float() for name, latents in made.items()}
    found: dict[str, Any] = {"seconds": seconds}
    for name in ("bfloat16", "int8", "int8_in_float32"):
        found[f"latents_{name}"] = error_of(made[name], made["float32"])
        found[f"waveform_{name}"] = error_of(sound[name], sound["float32"])
    found["latents_int8_over_bfloat16"] = found["latents_int8"] / found["latents_bfloat16"]
    found["latents_int8_to_bfloat16"] = error_of(made["int8"], made["bfloat16"])
    return found


def song(dit: Any, seconds: int) -> torch.Tensor:
    """Latents, [frames, channels] in float32, of eight steps of plain Euler."""
    generator = torch.Generator().manual_seed(1)
    packed = PackedDit(dit)
    frames, channels = 25 * seconds + seconds % 2, dit.config.audio_acoustic_hidden_dim

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(packed.device, packed.dtype)

    conditions = packed.conditions([noise(_CONDITION, dit.config.encoder_hidden_size)])
    pack = packed.lay_out([frames], conditions)
    latents, context = pack.join([noise(frames, channels)]).float(), pack.join([noise(frames, 2 * channels)])
    for step in range(_STEPS):
        now, then = 1 - step / _STEPS, 1 - (step + 1) / _STEPS
        times = torch.tensor([now, 0.0], dtype=packed.dtype, device=packed.device)
        velocity = packed.velocities(pack, latents.to(packed.dtype), context, conditions[0].kv, times)
        latents = latents - (now - then) * velocity.float()
    (made,) = pack.split(latents)
    return made


def costs(dit: Any, method: Any, seconds: int, *, tiny: bool) -> dict[str, Any]:
    """Bytes of the DiT, seconds to quantize and to move it, milliseconds a step of one song and of a full pack."""
    device = next(dit.parameters()).device
    began = time.perf_counter()
    quantize(dit, method, device)
    _wait(device)
    found: dict[str, Any] = {"gib": weight_bytes(dit) / 2**30, "quantize_s": time.perf_counter() - began}
    if device.type == "cuda":
        began = time.perf_counter()
        move(dit, "cpu")
        move(dit, device)
        found["to_ram_and_back_s"] = time.perf_counter() - began
    packed = PackedDit(dit)
    if not tiny:
        packed.compile()
    with torch.inference_mode():
        for name, lengths in (("one", [seconds]), ("30s", [min(30, seconds)]), ("full", [seconds] * 2)):
            found[f"step_ms_{name}"] = step_ms(packed, lengths)
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return found | lora(dit)


def step_ms(packed: PackedDit, lengths: list[int]) -> float:
    width, channels = packed.dit.config.encoder_hidden_size, packed.dit.config.audio_acoustic_hidden_dim

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=packed.device, dtype=packed.dtype)

    conditions = packed.conditions([noise(_CONDITION, width) for _ in lengths])
    frames = [25 * each + each % 2 for each in lengths]
    pack = packed.lay_out(frames, conditions)
    context, latents = (pack.join([noise(each, count) for each in frames]) for count in (2 * channels, channels))
    kv, times = torch.cat([each.kv for each in conditions], dim=2), noise(len(frames) + 1)
    return timed(lambda: packed.velocities(pack, latents, context, kv, times))


def lora(dit: Any) -> dict[str, Any]:
    """Seconds to merge a LoRA of rank 16 on all attention layers, and the bytes of the weights that it changed."""
    from safetensors.torch import save_file  # noqa: PLC0415 - here alone

    tensors = {}
    for name, module in dit.named_modules():
        if isinstance(module, torch.nn.Linear) and "attn.to_" in name:
            outputs, inputs = module.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(16, inputs) / 100
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(outputs, 16) / 100
    with TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file(tensors, path)
        cache = AdaptedModelCache()
        began = time.perf_counter()
        cache.adapted(dit, Lora.at(path, 1.0, alpha=16))
        _wait(next(dit.parameters()).device)
        return {"lora_s": time.perf_counter() - began, "lora_gib": cache.bytes / 2**30}


def logits(size: str, device: str) -> dict[str, Any]:
    """Errors of a language model's logits of codes, relative to float32, and how often the likeliest is the same."""
    shape = {name: value for name, value in shape_of(size).items() if name not in _NOT_SHAPE}
    torch.manual_seed(0)
    with torch.device(device):
        exact = Qwen3ForCausalLM(Qwen3Config(**shape)).eval().requires_grad_(requires_grad=False)
        ids = torch.randint(5, 150_000, (1, 512))
    plain = copy.deepcopy(exact).to(torch.bfloat16)
    small = copy.deepcopy(plain)
    quantize(small, "int8")
    told = [model(input_ids=ids).logits[0, :, -64_000:].float() for model in (exact, plain, small)]
    best = [each.argmax(-1) for each in told]
    return {
        "size": size,
        "logits_bfloat16": error_of(told[1], told[0]),
        "logits_int8": error_of(told[2], told[0]),
        "likeliest_bfloat16": float((best[1] == best[0]).float().mean()),
        "likeliest_int8": float((best[2] == best[0]).float().mean()),
        "gib_bfloat16": weight_bytes(plain) / 2**30,
        "gib_int8": weight_bytes(small) / 2**30,
    }


def error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pipeline(device: str, *, tiny: bool) -> Any:
    if not tiny:
        return full_size.pipeline(device, torch.bfloat16)
    from diffusers import AceStepPipeline  # noqa: PLC0415 - for trying out

    with TemporaryDirectory() as folder:
        tiny_checkpoint.write(Path(folder))
        found = AceStepPipeline.from_pretrained(Path(folder) / tiny_checkpoint.TURBO)
    found.transformer.to(torch.bfloat16)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--lm", default="1.7B")
    parser.add_argument("--tiny", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
