# SPDX-License-Identifier: Apache-2.0
"""Loading of the original layout into diffusers' classes: tensors go from the files into the modules, renamed.

Nothing is converted on disk. The modules are made without memory, and each gets the tensors of the mapped files; a
tensor that has the wanted type is not copied.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
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
from transformers import AutoModel, AutoTokenizer

from acestep_consumer.engine.renderer.original_layout import OriginalCheckpoint
from acestep_consumer.engine.renderer.registry import CheckpointError

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

_EVERYWHERE: Final = (
    "head_dim",
    "rope_theta",
    "attention_bias",
    "attention_dropout",
    "rms_norm_eps",
    "sliding_window",
)
_WIDTHS: Final = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def load_original(checkpoint: OriginalCheckpoint, dtype: torch.dtype, shared: Mapping[str, Any]) -> AceStepPipeline:
    """Load a model. ``shared``: components of another model that are the same, by name.

    Raises:
        CheckpointError: tensors are missing, or do not have the shapes that the config says.
    """
    tensors = _tensors(checkpoint.weights, dtype)
    silence = read_silence(checkpoint.silence).transpose(1, 2).contiguous()
    tensors["condition_encoder"][_SILENCE] = silence.to(dtype)
    configs = component_configs(checkpoint.config)
    parts = {}
    for name, kind in _COMPONENTS.values():
        with init_empty_weights(include_buffers=False):
            module = kind(**configs[name])
        fill(module, tensors.pop(name, {}), name)
        parts[name] = module
    return AceStepPipeline(
        **parts,
        vae=shared.get("vae") or AutoencoderOobleck.from_pretrained(checkpoint.vae, dtype=dtype, use_safetensors=True),
        text_encoder=shared.get("text_encoder") or _text_encoder(checkpoint.text_encoder, dtype),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint.text_encoder, local_files_only=True),
        # ACE-Step computes its own schedule, which the scheduler uses unchanged.
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


def _text_encoder(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)


def component_configs(config: Mapping[str, Any]) -> Mapping[str, dict[str, Any]]:
    """Return each component's own config. All but the DiT have the widths of ``encoder_*``, where XL models name them.

    Raises:
        CheckpointError: a field is missing.
    """
    try:
        everywhere = {name: config[name] for name in _EVERYWHERE}
        widths = {name: config[name] for name in _WIDTHS}
        narrow = {name: config.get(f"encoder_{name}") or width for name, width in widths.items()}
        layers, acoustic = config["layer_types"], config["audio_acoustic_hidden_dim"]
        pooler_layers = config["num_attention_pooler_hidden_layers"]
        pooler = {
            **everywhere,
            **narrow,
            "audio_acoustic_hidden_dim": acoustic,
            "pool_window_size": config["pool_window_size"],
            "num_attention_pooler_hidden_layers": pooler_layers,
            "layer_types": layers[:pooler_layers],
        }
        fsq = {name: config[name] for name in ("fsq_dim", "fsq_input_levels", "fsq_input_num_quantizers")}
        encoder = ("text_hidden_dim", "timbre_hidden_dim")
        encoder_layers = ("num_lyric_encoder_hidden_layers", "num_timbre_encoder_hidden_layers")
        transformer = ("num_hidden_layers", "in_channels", "patch_size", "layer_types")
        return {
            "transformer": {
                **everywhere,
                **widths,
                **{name: config[name] for name in transformer},
                "audio_acoustic_hidden_dim": acoustic,
                "encoder_hidden_size": narrow["hidden_size"],
                "is_turbo": bool(config.get("is_turbo")),
                "model_version": config.get("model_version"),
            },
            "condition_encoder": {
                **everywhere,
                **narrow,
                **{name: config[name] for name in (*encoder, *encoder_layers)},
            },
            "audio_tokenizer": {**pooler, **fsq},
            "audio_token_detokenizer": pooler,
        }
    except KeyError as error:
        raise CheckpointError(f"config.json has no field {error.args[0]}: download the model again") from error


def _tensors(files: tuple[Path, ...], dtype: torch.dtype) -> defaultdict[str, dict[str, torch.Tensor]]:
    """Return the tensors by component and by the names that they have there."""
    found: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no dict
                if (place := place_of(name)) is not None:
                    component, renamed = place
                    found[component][renamed] = file.get_tensor(name).to(dtype)
    return found


def place_of(name: str) -> tuple[str, str] | None:
    """Return the component of a tensor and its name there; None: it is of no component."""
    if name == _NULL_CONDITION:
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
