# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints in ACE-Step's original layout, written from those in diffusers' layout."""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_PREFIXES = {
    "transformer": "decoder.",
    "condition_encoder": "encoder.",
    "audio_tokenizer": "tokenizer.",
    "audio_token_detokenizer": "detokenizer.",
}
_NAMES = {
    "proj_in_conv.": "proj_in.1.",
    "proj_out_conv.": "proj_out.1.",
    ".to_q.": ".q_proj.",
    ".to_k.": ".k_proj.",
    ".to_v.": ".v_proj.",
    ".to_out.0.": ".o_proj.",
    ".norm_q.": ".q_norm.",
    ".norm_k.": ".k_norm.",
}
_ENCODER_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def write_original(source: Path, checkpoints: Path) -> Path:
    """Write the model at ``source`` below ``checkpoints``, with VAE and text encoder beside it; return its folder."""
    folder = checkpoints / source.name
    folder.mkdir(parents=True)
    tensors = original_tensors(source)
    torch.save(tensors.pop("encoder.silence_latent").transpose(1, 2).contiguous(), folder / "silence_latent.pt")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(original_config(source)), encoding="utf-8")
    shutil.copytree(source / "vae", checkpoints / "vae", dirs_exist_ok=True)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(source / part, checkpoints / "Qwen3-Embedding-0.6B", dirs_exist_ok=True)
    return folder


def original_tensors(source: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all components but VAE and text encoder, by their original names."""
    return {
        original_name(part, name): tensor
        for part in _PREFIXES
        for path in (source / part).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def original_name(part: str, name: str) -> str:
    if name == "null_condition_emb":
        return name
    for new, old in _NAMES.items():
        name = name.replace(new, old)
    return _PREFIXES[part] + name


def original_config(source: Path) -> dict[str, Any]:
    """Return one config for all components; ``encoder_*`` are the widths of all but the DiT."""
    dit, encoder, tokenizer = (_config(source / part) for part in tuple(_PREFIXES)[:3])
    config = {**tokenizer, **encoder, **dit, "model_type": "acestep"}
    config["layer_types"] = [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(config["num_hidden_layers"])
    ]
    if encoder["hidden_size"] != dit["hidden_size"]:
        config |= {f"encoder_{name}": encoder[name] for name in _ENCODER_WIDTHS}
    else:
        config.pop("encoder_hidden_size")
    return config


def shard(folder: Path, count: int) -> None:
    """Replace the weights' file by so many shards and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    place: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file)
        place |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}), encoding="utf-8")


def write_comfyui(checkpoints: Path, name: str, path: Path) -> Path:
    """Write the model, the VAE and the text encoder into one file, as ComfyUI has them; return the file."""
    parts = {
        "model.diffusion_model.": checkpoints / name / "model.safetensors",
        "vae.": checkpoints / "vae/diffusion_pytorch_model.safetensors",
        "text_encoders.qwen3_06b.transformer.model.": checkpoints / "Qwen3-Embedding-0.6B/model.safetensors",
    }
    tensors = {prefix + key: tensor for prefix, file in parts.items() for key, tensor in load_file(file).items()}
    save_file(tensors, path)
    return path


def write_gguf(folder: Path, path: Path) -> Path:
    """Write the model in ``folder`` into a GGUF file of float32 tensors, with config and silence; return the file."""
    tensors = load_file(folder / "model.safetensors")
    silence = torch.load(folder / "silence_latent.pt", weights_only=True)
    tensors["silence_latent"] = silence[0].T.contiguous()
    config = (folder / "config.json").read_bytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1)
    head += _gguf_text(b"acestep.config_json") + struct.pack("<I", 8) + _gguf_text(config)
    data = b""
    for name, tensor in tensors.items():
        shape = tuple(reversed(tensor.shape))
        head += _gguf_text(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += tensor.float().numpy().tobytes()
        data += bytes(-len(data) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def _gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _config(folder: Path) -> Mapping[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if not name.startswith("_")}


class Payload:
    """What unpickling this leaves behind: a folder of that name."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._mark,)
