# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint in ACE-Step's original layout, for the golden tests."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AceStepPipeline, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3Model

from acestep_consumer.engine.renderer.checkpoint import ModelHandle, _describe, _prepare
from acestep_consumer.engine.renderer.quiet_imports import quietly

_RENAMED = (
    (r"\bproj_in\.1\.", "proj_in_conv."),
    (r"\bproj_out\.1\.", "proj_out_conv."),
    (r"\b([qkv])_proj\.", r"to_\1."),
    (r"\bo_proj\.", "to_out.0."),
    (r"\b([qk])_norm\.", r"norm_\1."),
)
_COMMON = ("attention_bias", "attention_dropout", "head_dim", "rms_norm_eps", "rope_theta", "sliding_window")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def load(checkpoints: Path, name: str) -> ModelHandle:
    """Load the model of that name, widened to float32."""
    with quietly():
        return _load(checkpoints, name)


def _load(checkpoints: Path, name: str) -> ModelHandle:
    folder = checkpoints / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {key: value.float() for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    common = {key: config[key] for key in _COMMON}
    outer = {key: config[key] for key in _SIZES}
    inner = {key: config.get(f"encoder_{key}", config[key]) for key in _SIZES}
    acoustic, patch = config["audio_acoustic_hidden_dim"], config["patch_size"]
    pooled = {"num_attention_pooler_hidden_layers": config["num_attention_pooler_hidden_layers"]}
    dit = AceStepTransformer1DModel(
        **common,
        **outer,
        num_hidden_layers=config["num_hidden_layers"],
        in_channels=config["in_channels"],
        audio_acoustic_hidden_dim=acoustic,
        patch_size=patch,
        layer_types=config["layer_types"],
        encoder_hidden_size=inner["hidden_size"],
        is_turbo=config["is_turbo"],
        model_version=config["model_version"],
    )
    encoder = AceStepConditionEncoder(
        **common,
        **inner,
        text_hidden_dim=config["text_hidden_dim"],
        timbre_hidden_dim=config["timbre_hidden_dim"],
        num_lyric_encoder_hidden_layers=config["num_lyric_encoder_hidden_layers"],
        num_timbre_encoder_hidden_layers=config["num_timbre_encoder_hidden_layers"],
    )
    pool = {"pool_window_size": config["pool_window_size"], "audio_acoustic_hidden_dim": acoustic, **pooled}
    tokenizer = AceStepAudioTokenizer(
        **common,
        **inner,
        **pool,
        fsq_dim=config["fsq_dim"],
        fsq_input_levels=config["fsq_input_levels"],
        fsq_input_num_quantizers=config["fsq_input_num_quantizers"],
    )
    detokenizer = AceStepAudioTokenDetokenizer(**common, **inner, **pool)
    silence = torch.load(folder / "silence_latent.pt", weights_only=True).float().transpose(1, 2).contiguous()
    own = {"null_condition_emb": weights["null_condition_emb"], "silence_latent": silence}
    _fill(dit, _part(weights, "decoder"))
    _fill(encoder, {**_part(weights, "encoder"), **own})
    _fill(tokenizer, _part(weights, "tokenizer"))
    _fill(detokenizer, _part(weights, "detokenizer"))
    qwen = checkpoints / "Qwen3-Embedding-0.6B"
    pipeline = AceStepPipeline(
        vae=AutoencoderOobleck.from_pretrained(checkpoints / "vae", torch_dtype=torch.float32),
        text_encoder=Qwen3Model.from_pretrained(qwen, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(qwen),
        transformer=dit,
        condition_encoder=encoder,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        audio_tokenizer=tokenizer,
        audio_token_detokenizer=detokenizer,
    )
    _prepare(pipeline)
    return ModelHandle(_describe(name, pipeline, config), pipeline, config)


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    found = {}
    for key, value in weights.items():
        if key.startswith(f"{prefix}."):
            renamed = key.removeprefix(f"{prefix}.")
            for pattern, replacement in _RENAMED:
                renamed = re.sub(pattern, replacement, renamed)
            found[renamed] = value
    return found


def _fill(module: Any, weights: dict[str, torch.Tensor]) -> None:
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert not [key for key in missing if not key.endswith("rotary_emb.inv_freq")], missing
