# SPDX-License-Identifier: Apache-2.0
"""Seconds to load a model from ACE-Step's original layout and from diffusers' layout, side by side on the CPU.

Both layouts hold the same weights in bfloat16, as they are published. In float32, as a CPU worker has them, loading
reads and converts every tensor; in bfloat16, as a GPU worker has them, it maps the files, and a copy of every weight,
as to a GPU, is part of the time. The two take turns, and the shortest time of each counts.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AceStepPipeline
from safetensors.torch import load_file, save_file

from acestep_consumer.engine.renderer.checkpoints.original_layout import open_original
from acestep_consumer.engine.renderer.checkpoints.original_weights import load_original
from acestep_consumer.engine.renderer.quiet_imports import quietly
from acestep_consumer.engine.testing import tiny_checkpoint
from tests.support.original_layout import write_original

_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 256,
    "num_key_value_heads": 128,
    "head_dim": 8,
}


def main() -> None:
    """Write both checkpoints, load each in turns, and print a line for each model and type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24, help="of the larger model's DiT, 44 MB each")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, quietly():
        for name in ("tiny", "large"):
            converted, original = _write(Path(folder) / name, asked.layers if name == "large" else None)
            size = sum(path.stat().st_size for path in converted.rglob("*.safetensors"))
            for dtype in (torch.float32, torch.bfloat16):
                took = [(_diffusers(converted, dtype), _original(original, dtype)) for _ in range(asked.turns)]
                best = [min(times) for times in zip(*took, strict=True)]
                sys.stdout.write(
                    f"{name} ({size / 1e9:.3f} GB), {dtype}: diffusers' layout {best[0]:.3f} s, "
                    f"original layout {best[1]:.3f} s\n"
                )
                sys.stdout.flush()


def _write(folder: Path, layers: int | None) -> tuple[Path, Path]:
    tiny_checkpoint.write(folder / "diffusers")
    converted = folder / "diffusers" / tiny_checkpoint.TURBO
    if layers is not None:
        _enlarge(converted, layers)
    for path in converted.rglob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    return converted, write_original(converted, folder / "original")


def _enlarge(folder: Path, layers: int) -> None:
    kind = AceStepPipeline.from_pretrained(folder).transformer.__class__
    channels = tiny_checkpoint._LATENT_CHANNELS
    with torch.device("cpu"):
        dit = kind(
            **_LARGE,
            num_hidden_layers=layers,
            in_channels=3 * channels,
            audio_acoustic_hidden_dim=channels,
            encoder_hidden_size=tiny_checkpoint._WIDTH,
            is_turbo=True,
            model_version="turbo",
        )
    dit.bfloat16().save_pretrained(folder / "transformer", max_shard_size="100GB")


def _diffusers(folder: Path, dtype: torch.dtype) -> float:
    began = time.perf_counter()
    _read(AceStepPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True))
    return time.perf_counter() - began


def _original(folder: Path, dtype: torch.dtype) -> float:
    began = time.perf_counter()
    _read(load_original(open_original(folder, None), dtype, {}))
    return time.perf_counter() - began


def _read(pipeline: Any) -> None:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for weight in part.parameters():
                weight.detach().clone()


if __name__ == "__main__":
    main()
