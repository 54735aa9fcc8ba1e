# SPDX-License-Identifier: Apache-2.0
"""Sizes of models that are on the disk, whatever they are called."""

import json
from collections.abc import Mapping
from pathlib import Path

from acestep_consumer.commands.plan.model_size import SizedDit, size_of_dit
from acestep_consumer.policy.benchmarks import DIT_2B, DIT_XL

Shapes = Mapping[str, tuple[int, ...]]
XL: Shapes = {"proj_in.1.weight": (2560, 192, 2), "layers.31.mlp.up_proj.weight": (4_999_000_000,)}
OTHER: Shapes = {"proj_in.1.weight": (1024, 192, 2), "layers.7.mlp.up_proj.weight": (300_000_000,)}


def write(path: Path, shapes: Shapes, prefix: str = "decoder.") -> Path:
    """Write a file that has these tensors in its header, and no bytes of them."""
    header = {
        prefix + name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()
    }
    content = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    return path


def original(folder: Path, shapes: Shapes, *, turbo: bool = True) -> Path:
    tensors = {f"decoder.{name}": shape for name, shape in shapes.items()}
    write(folder / "model.safetensors", {**tensors, "encoder.layers.99.weight": (10**9,)}, prefix="")
    (folder / "config.json").write_text(json.dumps({"is_turbo": turbo}), encoding="utf-8")
    return folder


def test_a_model_has_the_size_of_its_tensors_and_not_of_its_name(tmp_path: Path) -> None:
    folder = original(tmp_path / "my-turbo-2b", XL, turbo=False)
    assert size_of_dit(str(folder), None) == SizedDit(DIT_XL, turbo=False, on_disk=True)
    original(tmp_path / "acestep-v15-xl-turbo", OTHER)
    found = size_of_dit("acestep-v15-xl-turbo", tmp_path)
    assert (found.size.name, found.size.layers, found.size.hidden, found.turbo) == ("0.3B", 8, 1024, True)


def test_of_a_file_with_other_parts_the_dit_counts_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "ace_step_turbo.safetensors", XL, prefix="model.diffusion_model.decoder.")
    assert size_of_dit(str(file), None) == SizedDit(DIT_XL, turbo=True, on_disk=True)


def test_in_diffusers_layout_the_transformer_counts(tmp_path: Path) -> None:
    shapes = {"proj_in_conv.weight": (2560, 192, 2), "layers.31.mlp.up_proj.weight": (4_999_000_000,)}
    write(tmp_path / "mine/transformer/diffusion_pytorch_model.safetensors", shapes, prefix="")
    (tmp_path / "mine/model_index.json").write_text('{"_class_name": "AceStepPipeline"}', encoding="utf-8")
    assert size_of_dit("mine", tmp_path) == SizedDit(DIT_XL, turbo=False, on_disk=True)


def test_a_model_that_is_not_here_or_cannot_be_read_has_the_size_of_its_name(tmp_path: Path) -> None:
    assert size_of_dit("acestep-v15-xl-base", tmp_path) == SizedDit(DIT_XL, turbo=False, on_disk=False)
    folder = original(tmp_path / "acestep-v15-turbo", XL)
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert size_of_dit("acestep-v15-turbo", tmp_path) == SizedDit(DIT_2B, turbo=True, on_disk=False)
    (folder / "model.safetensors").unlink()
    assert not size_of_dit("acestep-v15-turbo", tmp_path).on_disk
