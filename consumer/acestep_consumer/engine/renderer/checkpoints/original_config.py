# SPDX-License-Identifier: Apache-2.0
"""The config of a model in ACE-Step's original layout: the components' own configs in it, and tensors that must fit."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType, NoneType
from typing import Any, Final

from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError

MODEL_TYPE: Final = "acestep"

_EVERYWHERE: Final = (
    "head_dim",
    "rope_theta",
    "attention_bias",
    "attention_dropout",
    "rms_norm_eps",
    "sliding_window",
)
_WIDTHS: Final = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_TRANSFORMER: Final = ("num_hidden_layers", "in_channels", "patch_size", "layer_types", "audio_acoustic_hidden_dim")
_ENCODER: Final = (
    "text_hidden_dim",
    "timbre_hidden_dim",
    "num_lyric_encoder_hidden_layers",
    "num_timbre_encoder_hidden_layers",
)
_POOLER: Final = ("audio_acoustic_hidden_dim", "pool_window_size", "num_attention_pooler_hidden_layers")
_FSQ: Final = ("fsq_dim", "fsq_input_levels", "fsq_input_num_quantizers")
# Kinds of the fields that are no whole numbers.
_KINDS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "rope_theta": (int, float),
        "attention_bias": bool,
        "attention_dropout": (int, float),
        "rms_norm_eps": (int, float),
        "sliding_window": (int, NoneType),
        "layer_types": list,
        "fsq_input_levels": (list, NoneType),
    }
)


def component_configs(config: Mapping[str, Any], place: object) -> Mapping[str, dict[str, Any]]:
    """Return each component's own config. All but the DiT have the widths of ``encoder_*``, where XL models name them.

    ``place``: of the config, for the error.

    Raises:
        CheckpointError: a field is missing, or it is another model's config.
    """
    if (kind := config.get("model_type")) != MODEL_TYPE:
        raise CheckpointError(
            f"{place} holds a {kind or 'model of no type'}, and no ACE-Step 1.5 ({MODEL_TYPE}): "
            "choose another folder with ACESTEP_CONFIG_PATH or --model"
        )

    def fields(*names: str) -> dict[str, Any]:
        for name in names:
            if not isinstance(config[name], _KINDS.get(name, int)):
                raise CheckpointError(f"{place}: {name} of config.json is {config[name]!a}: download the model again")
        return {name: config[name] for name in names}

    try:
        widths = fields(*_WIDTHS)
        narrow = {name: config.get(f"encoder_{name}") or width for name, width in widths.items()}
        everywhere = fields(*_EVERYWHERE)
        pooler = {**everywhere, **narrow, **fields(*_POOLER)}
        pooler["layer_types"] = fields("layer_types")["layer_types"][: pooler["num_attention_pooler_hidden_layers"]]
        return {
            "transformer": {
                **everywhere,
                **widths,
                **fields(*_TRANSFORMER),
                "encoder_hidden_size": narrow["hidden_size"],
                "is_turbo": bool(config.get("is_turbo")),
                "model_version": config.get("model_version"),
            },
            "condition_encoder": {**everywhere, **narrow, **fields(*_ENCODER)},
            "audio_tokenizer": {**pooler, **fields(*_FSQ)},
            "audio_token_detokenizer": pooler,
        }
    except KeyError as error:
        raise CheckpointError(f"{place}: config.json has no field {error.args[0]}: download the model again") from error


def check_fit(configs: Mapping[str, dict[str, Any]], shapes: Mapping[str, tuple[int, ...]], place: object) -> None:
    """Compare a few tensors of each component with its config, which tells every other model apart in milliseconds.

    Raises:
        CheckpointError: the tensors are of another model.
    """
    if fault := next(_faults(configs, shapes), None):
        raise CheckpointError(
            f"{place}: the weights do not fit config.json, they are of another model: {fault}: download the model again"
        )


def _faults(configs: Mapping[str, dict[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in _expected(configs):
        if name not in shapes:
            yield f"{name} is missing"
        elif shapes[name] != shape:
            yield f"{name} is {list(shapes[name])} in place of {list(shape)}"
    layers = configs["transformer"]["num_hidden_layers"]
    if f"decoder.layers.{layers}.mlp.up_proj.weight" in shapes:
        yield f"there are more than {layers} layers"


def _expected(configs: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    dit, encoder = configs["transformer"], configs["condition_encoder"]
    width, narrow, acoustic = dit["hidden_size"], encoder["hidden_size"], dit["audio_acoustic_hidden_dim"]
    last = dit["num_hidden_layers"] - 1
    yield "decoder.proj_in.1.weight", (width, dit["in_channels"], dit["patch_size"])
    yield "decoder.condition_embedder.weight", (width, narrow)
    yield f"decoder.layers.{last}.mlp.up_proj.weight", (dit["intermediate_size"], width)
    yield f"decoder.layers.{last}.self_attn.q_proj.weight", (dit["num_attention_heads"] * dit["head_dim"], width)
    yield "encoder.text_projector.weight", (narrow, encoder["text_hidden_dim"])
    yield "tokenizer.audio_acoustic_proj.weight", (narrow, acoustic)
    yield "detokenizer.proj_out.weight", (acoustic, narrow)
    yield "null_condition_emb", (1, 1, narrow)
