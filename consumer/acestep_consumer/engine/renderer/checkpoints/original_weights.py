# SPDX-License-Identifier: Apache-2.0
"""Loading of the original layout into diffusers' classes: tensors go from the files into the modules, renamed.

Nothing is converted on disk. The modules are made without memory, and each gets the tensors of the mapped files; a
tensor that has the wanted type is not copied.
"""

import math
import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from diffusers import AceStepPipeline, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoTokenizer

from acestep_consumer.engine.renderer.checkpoints.original_config import component_configs
from acestep_consumer.engine.renderer.checkpoints.original_layout import COMFYUI_DIT, COMFYUI_PARTS, OriginalCheckpoint
from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError
from acestep_consumer.engine.renderer.checkpoints.tensor_files import GGUF_SUFFIX, read_header

# First part of a tensor's name -> component of the pipeline, and its class.
_COMPONENTS: Final = MappingProxyType(
    {
        "decoder": ("transformer", AceStepTransformer1DModel),
        "encoder": ("condition_encoder", AceStepConditionEncoder),
        "tokenizer": ("audio_tokenizer", AceStepAudioTokenizer),
        "detokenizer": ("audio_token_detokenizer", AceStepAudioTokenDetokenizer),
    }
)
# Parts of names that differ. The projections were elements of a Sequential.
_RENAMED: Final = (
    ("proj_in.1.", "proj_in_conv."),
    ("proj_out.1.", "proj_out_conv."),
    (".q_proj.", ".to_q."),
    (".k_proj.", ".to_k."),
    (".v_proj.", ".to_v."),
    (".o_proj.", ".to_out.0."),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
)
_NULL_CONDITION: Final = "null_condition_emb"
_SILENCE: Final = "silence_latent"
_SHOWN: Final = 3
_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_original(checkpoint: OriginalCheckpoint, dtype: torch.dtype, shared: Mapping[str, Any]) -> AceStepPipeline:
    """Load a model. ``shared``: components of another model that are the same, by name.

    Raises:
        CheckpointError: tensors are missing, or do not have the shapes that the config says.
    """
    tensors = _tensors(checkpoint.weights, dtype)
    encoder = tensors["condition_encoder"]
    if checkpoint.silence is not None:
        encoder[_SILENCE] = read_silence(checkpoint.silence).transpose(1, 2).contiguous().to(dtype)
    else:
        encoder[_SILENCE] = encoder[_SILENCE].reshape(1, *encoder[_SILENCE].shape[-2:])
    configs = component_configs(checkpoint.config, checkpoint.weights[0].parent)
    parts = {name: _filled(kind, configs[name], tensors.pop(name, {}), name) for name, kind in _COMPONENTS.values()}
    return AceStepPipeline(
        **parts,
        vae=shared.get("vae") or _vae(checkpoint, tensors, dtype),
        text_encoder=shared.get("text_encoder") or _text_encoder(checkpoint, tensors, dtype),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint.text_encoder, local_files_only=True),
        # ACE-Step computes its own schedule, which the scheduler uses unchanged.
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


def _filled(
    kind: Callable[..., torch.nn.Module], config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], what: str
) -> torch.nn.Module:
    with init_empty_weights(include_buffers=False):
        module = kind(**config)
    fill(module, tensors, what)
    return module


def _vae(checkpoint: OriginalCheckpoint, tensors: Mapping[str, dict[str, torch.Tensor]], dtype: torch.dtype) -> Any:
    if "vae" not in checkpoint.inside:
        return AutoencoderOobleck.from_pretrained(checkpoint.vae, dtype=dtype, use_safetensors=True)
    config = {"config": AutoencoderOobleck.load_config(checkpoint.vae, local_files_only=True)}
    return _filled(AutoencoderOobleck.from_config, config, tensors["vae"], "vae")


def _text_encoder(
    checkpoint: OriginalCheckpoint, tensors: Mapping[str, dict[str, torch.Tensor]], dtype: torch.dtype
) -> Any:
    folder = checkpoint.text_encoder
    if "text_encoder" not in checkpoint.inside:
        return AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    config = {"config": AutoConfig.from_pretrained(folder, local_files_only=True)}
    return _filled(AutoModel.from_config, config, tensors["text_encoder"], "text_encoder")


def _tensors(files: tuple[Path, ...], dtype: torch.dtype) -> defaultdict[str, dict[str, torch.Tensor]]:
    """Return the tensors by component and by the names that they have there."""
    found: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for path in files:
        for name, tensor in _mapped(path) if path.suffix == GGUF_SUFFIX else _safetensors(path):
            if (place := place_of(name)) is not None:
                component, renamed = place
                found[component][renamed] = tensor.to(dtype)
    return found


def _safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no dict
            yield name, file.get_tensor(name)


def _mapped(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a GGUF file, over the mapped file. Writing to one would change nothing in the file."""
    header = read_header(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, info in header.tensors.items():
        flat = torch.frombuffer(mapped, dtype=_DTYPES[info.dtype], count=math.prod(info.shape), offset=info.offset)
        yield name, flat.reshape(info.shape)


def place_of(name: str) -> tuple[str, str] | None:
    """Return the component of a tensor and its name there; None: it is of no component."""
    for part, start in COMFYUI_PARTS.items():
        if name.startswith(start):
            return part, name.removeprefix(start)
    name = name.removeprefix(COMFYUI_DIT)
    if name in (_NULL_CONDITION, _SILENCE):
        return "condition_encoder", name
    prefix, _, rest = name.partition(".")
    if prefix not in _COMPONENTS:
        return None
    for old, new in _RENAMED:
        rest = rest.replace(old, new)
    return _COMPONENTS[prefix][0], rest


def fill(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Set every parameter and buffer of an empty module.

    Raises:
        CheckpointError: one is missing, is too much, or has another shape.
    """
    if faults := tuple(_faults(module.state_dict(), tensors)):
        more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError(
            f"its weights do not fit config.json; {what.replace('_', ' ')}: {', '.join(faults[:_SHOWN])}{more}: "
            "the files are of different models"
        )
    module.load_state_dict(tensors, assign=True)


def _faults(wanted: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in wanted if name not in tensors)
    yield from (f"{name} is unknown" for name in tensors if name not in wanted)
    for name in wanted.keys() & tensors.keys():
        if wanted[name].shape != tensors[name].shape:
            yield f"{name} is {list(tensors[name].shape)} in place of {list(wanted[name].shape)}"


def read_silence(path: Path) -> torch.Tensor:
    """Return the latents of silence, [1, channels, frames].

    Raises:
        CheckpointError: the file holds anything but one tensor of that shape. No code of it is run.
    """
    try:
        silence = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} holds more than one tensor: download the file again") from error
    if not isinstance(silence, torch.Tensor) or silence.ndim != 3 or not silence.is_floating_point():  # noqa: PLR2004
        raise CheckpointError(f"{path} holds no tensor of three dimensions: download the file again")
    return silence
