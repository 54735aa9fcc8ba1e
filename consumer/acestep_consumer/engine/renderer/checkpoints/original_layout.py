# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in ACE-Step's original layout: a DiT folder, with the VAE and the text encoder beside it. Loads nothing.

checkpoints/acestep-v15-turbo/  config.json, model.safetensors or shards with an index, silence_latent.pt
checkpoints/vae/                diffusers' AutoencoderOobleck
checkpoints/Qwen3-Embedding-0.6B/
"""

import json
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from acestep_consumer.engine.published_models import PUBLISHED, pull_command
from acestep_consumer.engine.renderer.checkpoints.component_files import faults_of_lm, faults_of_model
from acestep_consumer.engine.renderer.checkpoints.original_config import check_fit, component_configs
from acestep_consumer.engine.renderer.checkpoints.registry import SILENCE, CheckpointError
from acestep_consumer.engine.renderer.checkpoints.tensor_files import (
    AGAIN,
    GGUF_SUFFIX,
    FileDamaged,
    Header,
    TensorInfo,
    read_header,
)

WEIGHTS: Final = "model.safetensors"
SHARDS: Final = "model.safetensors.index.json"
VAE: Final = "vae"
TEXT_ENCODER: Final = "Qwen3-Embedding-0.6B"

# Prefixes in ComfyUI's file.
COMFYUI_DIT: Final = "model.diffusion_model."
COMFYUI_PARTS: Final = {"vae": "vae.", "text_encoder": "text_encoders.qwen3_06b.transformer.model."}
# In a GGUF file.
GGUF_CONFIG: Final = "acestep.config_json"
GGUF_SILENCE: Final = "silence_latent"

# A number of the VAE's and the text encoder's config, and the field of the model's that it must equal.
_WIDTHS: Final = MappingProxyType(
    {
        "vae": ("decoder_input_channels", "audio_acoustic_hidden_dim"),
        "text_encoder": ("hidden_size", "text_hidden_dim"),
    }
)
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_FAMILIES: Final = ("turbo", "sft", "base")
# All that a pickled tensor needs; torch's types are Storage classes.
_HARMLESS: Final = frozenset({"torch._utils _rebuild_tensor_v2", "collections OrderedDict"})
_OBJECTS: Final = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4"})


@dataclass(frozen=True, slots=True)
class OriginalCheckpoint:
    """A model in the original layout.

    Attributes:
        config: of the DiT and all that was trained with it, as in config.json.
        weights: the files that hold its tensors.
        silence: the VAE's latents of silence, a tensor [1, channels, frames]; None: they are in the weights' file.
        vae: folder of the VAE.
        text_encoder: folder of the text encoder and its tokenizer.
        inside: components whose weights are in the weights' file; of their folders the rest is used.
    """

    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    silence: Path | None
    vae: Path
    text_encoder: Path
    inside: frozenset[str] = frozenset()

    def place_of(self, part: str) -> Path:
        """Return the folder of ``vae`` or ``text_encoder``, or the file that holds its weights."""
        return self.weights[0] if part in self.inside else getattr(self, part)


def open_original(place: Path, checkpoint_dir: Path | None) -> OriginalCheckpoint:
    """Find and check the files of a model. VAE and text encoder are looked for beside it, then in ``checkpoint_dir``.

    ``place``: a folder, or a file of ComfyUI's or a GGUF file. No tensor is read.

    Raises:
        CheckpointError: a file is missing or damaged, or it is another model.
    """
    places = tuple(dict.fromkeys((place.parent, *_given(checkpoint_dir), place.resolve().parent, place)))
    return _open_file(place, places) if place.is_file() else _open_folder(place, places)


def _open_folder(folder: Path, places: tuple[Path, ...]) -> OriginalCheckpoint:
    config, weights = read_json(folder / "config.json"), _weights(folder)
    tensors = {name: info for path in weights for name, info in _header(path).tensors.items()}
    _check_types(folder, tensors)
    check_fit(component_configs(config, folder), _shapes(tensors), folder)
    silence = _file(folder / SILENCE)
    _check_silence(silence)
    vae, text_encoder = _parts(config, places)
    return OriginalCheckpoint(config, weights, silence, vae, text_encoder)


def _open_file(path: Path, places: tuple[Path, ...]) -> OriginalCheckpoint:
    header = _header(path)
    tensors = {name.removeprefix(COMFYUI_DIT): info for name, info in header.tensors.items()}
    _check_types(path, tensors)
    if path.suffix == GGUF_SUFFIX and GGUF_CONFIG in header.metadata:
        try:
            config = dict(json.loads(header.metadata[GGUF_CONFIG]))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: its {GGUF_CONFIG} is no JSON object: download it again") from error
        check_fit(component_configs(config, path), _shapes(tensors), path)
        silence = None if GGUF_SILENCE in tensors else _file(_family_of(path, tensors, places) / SILENCE)
    else:
        folder = _family_of(path, tensors, places)
        config, silence = read_json(folder / "config.json"), folder / SILENCE
    if silence is not None:
        _check_silence(silence)
    inside = frozenset(
        part for part, prefix in COMFYUI_PARTS.items() if any(name.startswith(prefix) for name in tensors)
    )
    vae, text_encoder = _parts(config, places, inside)
    return OriginalCheckpoint(config, (path,), silence, vae, text_encoder, inside=inside)


def _family_of(path: Path, tensors: Mapping[str, TensorInfo], places: tuple[Path, ...]) -> Path:
    """Return a model's folder beside a file that has no config or no silence: one of the same shapes and family.

    Turbo, base and SFT have the same shapes, so the file's name has to say which it is where several are there.
    """
    if "decoder.proj_in.1.weight" not in tensors:
        raise CheckpointError(f"{path} holds no ACE-Step 1.5: it has no decoder.proj_in.1.weight")
    word = next((each for each in _FAMILIES if each in path.stem.lower()), "")
    found = [folder for folder in _folders_beside(places) if word in folder.name and _fits(folder, tensors)]
    if not found:
        raise CheckpointError(
            f"{path} holds no config.json and no {SILENCE}: put those of its model into a folder "
            f"acestep-v15-{word or 'turbo'} beside it"
        )
    if len({bool(read_json(folder / "config.json").get("is_turbo")) for folder in found}) > 1:
        names = " or ".join(folder.name for folder in found)
        raise CheckpointError(f"{path} could be {names}: put turbo, base or sft into its name")
    return found[0]


def _folders_beside(places: tuple[Path, ...]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            yield from sorted(
                each.parent for each in place.glob(f"*/{SILENCE}") if each.with_name("config.json").is_file()
            )


def _fits(folder: Path, tensors: Mapping[str, TensorInfo]) -> bool:
    try:
        check_fit(component_configs(read_json(folder / "config.json"), folder), _shapes(tensors), folder)
    except CheckpointError:
        return False
    return True


def _shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in tensors.items()}


def _header(path: Path) -> Header:
    try:
        return read_header(path)
    except FileDamaged as error:
        raise CheckpointError(f"{path} {error}".replace(AGAIN, _again(path.parent))) from error


def _check_types(place: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse weights of a quantised DiT: without its scales they would be another model."""
    kinds = {info.dtype for name, info in tensors.items() if name.startswith("decoder.")}
    if quantised := sorted(kinds - _FLOATS):
        raise CheckpointError(
            f"{place} holds quantised tensors ({', '.join(quantised)}), which cannot be used: take the model in BF16"
        )


def _parts(
    config: Mapping[str, Any], places: tuple[Path, ...], inside: frozenset[str] = frozenset()
) -> tuple[Path, Path]:
    """Return the folders of the VAE and the text encoder: complete, and those that the model was trained with.

    Of a part that is ``inside`` the weights' file, the folder needs no weights.
    """
    folders = {"vae": _sibling(VAE, places), "text_encoder": _sibling(TEXT_ENCODER, places)}
    for part, (width, wanted) in _WIDTHS.items():
        folder = folders[part]
        faults = faults_of_model(folder) if part == "vae" else faults_of_lm(folder)
        found = "; ".join(() if part in inside else faults)
        if found:
            raise CheckpointError(f"{folder} is incomplete: {found}: {_again(folder)}")
        own = read_json(folder / "config.json").get(width, config[wanted])
        if own != config[wanted]:
            raise CheckpointError(
                f"{folder} is of another model: {width} is {own} in place of {config[wanted]}: {_again(folder)}"
            )
    return folders["vae"], folders["text_encoder"]


def _check_silence(path: Path) -> None:
    """Look at the instructions of the pickled tensor, without following them.

    Raises:
        CheckpointError: it would do more than to make a tensor, or it is no file of torch's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [each for each in archive.namelist() if each.endswith("/data.pkl")]
            pickled = archive.read(name)
        wanted = [
            str(value) if code.name == "GLOBAL" else code.name
            for code, value, _ in pickletools.genops(pickled)
            if code.name == "GLOBAL" or code.name in _OBJECTS
        ]
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: check its permissions") from error
    except (OSError, ValueError, RuntimeError, EOFError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is not a tensor that torch saved, or was cut off: {_again(path.parent)}"
        ) from error
    strange = [each for each in wanted if each not in _HARMLESS and not _is_storage(each)]
    if strange:
        raise CheckpointError(f"{path} holds code ({strange[0]!a}), which is not run: {_again(path.parent)}")


def _is_storage(name: str) -> bool:
    module, _, kind = name.partition(" ")
    return module == "torch" and kind.isalnum() and kind.endswith("Storage")


def _given(checkpoint_dir: Path | None) -> Iterator[Path]:
    if checkpoint_dir is not None:
        yield checkpoint_dir


def _weights(folder: Path) -> tuple[Path, ...]:
    """Return the weights' files: one, or the shards that the index lists."""
    if not (folder / SHARDS).is_file():
        return (_file(folder / WEIGHTS),)
    try:
        named = sorted(set(read_json(folder / SHARDS)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / SHARDS} cannot be read: it has no weight_map") from error
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, of {len(named)} files: {_again(folder)}")
    return tuple(folder / name for name in named)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} lacks {path.name}: {_again(path.parent)}")
    return path


def _again(folder: Path) -> str:
    """Return how to get what a folder lacks."""
    if folder.name not in PUBLISHED:
        return "download the model again"
    return f"download it with: {pull_command(folder.name, checkpoints=folder.parent)}"


def _sibling(name: str, places: tuple[Path, ...]) -> Path:
    for place in places:
        if (place / name / "config.json").is_file():
            return place / name
    looked = ", ".join(str(place / name) for place in places)
    raise CheckpointError(
        f"the {name} folder that every model in ACE-Step's layout needs is missing (looked for {looked}): "
        f"download it with: {pull_command(name, checkpoints=places[0])}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        CheckpointError: it is missing, or it is no JSON object.
    """
    try:
        content = json.loads(_file(path).read_text(encoding="utf-8"))
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: check its permissions") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {_again(path.parent)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no JSON object")
    return content
