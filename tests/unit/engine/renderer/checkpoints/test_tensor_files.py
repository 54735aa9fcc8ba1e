# SPDX-License-Identifier: Apache-2.0
"""Headers of safetensors and GGUF files. The files in ``gguf/`` were written by the package gguf 0.19."""

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from acestep_consumer.engine.renderer.checkpoints.tensor_files import FileDamaged, TensorInfo, read_header

GGUF = Path(__file__).parent / "gguf"


def complaint(path: Path) -> str:
    with pytest.raises(FileDamaged) as caught:
        read_header(path)
    return str(caught.value)


def test_a_gguf_files_tensors_and_metadata_are_read_as_its_own_package_wrote_them() -> None:
    header = read_header(GGUF / "three_tensors.gguf")
    assert header.tensors == {
        "whole": TensorInfo("F32", (2, 3), 512),
        "half": TensorInfo("F16", (4,), 544),
        "brain": TensorInfo("BF16", (1, 2), 576),
    }
    assert header.metadata["acestep.config_json"] == '{"model_type":"acestep"}'
    assert (header.metadata["acestep.patch_size"], header.metadata["acestep.is_turbo"]) == (2, True)
    assert (header.metadata["acestep.fsq_input_levels"], header.metadata["words"]) == ([8, 5], ["la", "la la"])
    assert header.metadata["third"] == pytest.approx(1 / 3)


def test_quantised_tensors_are_refused_with_what_to_take_instead() -> None:
    text = complaint(GGUF / "quantised.gguf")
    assert text.startswith("holds quantised tensors (GGML types 8)")
    assert "BF16" in text


def test_a_safetensors_files_tensors_are_where_the_header_says(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": ("F32", (4,)),
        "b": ("BF16", (2, 3)),
    }
    content = (tmp_path / "a.safetensors").read_bytes()
    assert struct.unpack_from("<4f", content, header.tensors["a"].offset) == (0, 1, 2, 3)


@pytest.mark.parametrize("missing", [1, 30])
def test_a_file_that_was_cut_off_says_how_much_is_there(missing: int, tmp_path: Path) -> None:
    save_file({"a": torch.arange(64.0)}, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", tmp_path / "b.gguf"):
        whole = path.read_bytes() if path.exists() else (GGUF / "three_tensors.gguf").read_bytes()[:580]
        path.write_bytes(whole[:-missing])
        assert f"has {len(whole) - missing:,} of {len(whole):,} bytes" in complaint(path)


@pytest.mark.parametrize("size", [0, 3, 4, 7, 8, 20, 24, 60, 200, 400])
@pytest.mark.parametrize("name", ["a.gguf", "a.safetensors"])
def test_a_header_that_was_cut_off_is_refused(name: str, size: int, tmp_path: Path) -> None:
    save_file({f"tensor {number}": torch.zeros(1) for number in range(20)}, tmp_path / "whole.safetensors")
    whole = tmp_path / "whole.safetensors" if name.endswith("s") else GGUF / "three_tensors.gguf"
    (tmp_path / name).write_bytes(whole.read_bytes()[:size])
    assert "download it again" in complaint(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 60),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"a", 1 << 31),
        b"GGUF" + (struct.pack("<IQQQ1s", 3, 0, 1, 1, b"a") + struct.pack("<IIQ", 9, 9, 1) * 5_000),
        b"GGML" + bytes(100),
    ],
)
def test_a_hostile_gguf_file_is_refused_at_once(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    assert "download it again" in complaint(tmp_path / "a.gguf")
