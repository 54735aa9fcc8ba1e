# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in the shapes of ACE-Step 1.5's 2B models, with random weights: time and memory depend on shapes."""

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
from transformers import Qwen3Config, Qwen3Model

from acestep_consumer.engine.testing import tiny_checkpoint

_LATENT = 64
_HEADS: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
_BLOCK: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 6144, **_HEADS}
_TEXT: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, **_HEADS}


def pipeline(device: str, dtype: torch.dtype, *, turbo: bool = True) -> AceStepPipeline:
    """Return a pipeline of full size, its weights drawn on ``device``. 6.2 GB in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            parts = _modules(turbo=turbo)
    finally:
        torch.set_default_dtype(before)
    for part in parts.values():
        part.to(device=device, dtype=dtype).eval().requires_grad_(requires_grad=False)
    parts["condition_encoder"].silence_latent.normal_(std=0.1)
    return AceStepPipeline(
        **parts,
        tokenizer=tiny_checkpoint.tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


def write(folder: Path, model: str = tiny_checkpoint.TURBO, device: str = "cuda") -> None:
    """Write a checkpoint of full size below ``folder``."""
    turbo = model == tiny_checkpoint.TURBO
    pipeline(device, torch.bfloat16, turbo=turbo).save_pretrained(folder / model)


def _modules(*, turbo: bool) -> dict[str, Any]:
    return {
        "transformer": AceStepTransformer1DModel(
            **_BLOCK,
            num_hidden_layers=24,
            in_channels=3 * _LATENT,
            audio_acoustic_hidden_dim=_LATENT,
            encoder_hidden_size=2048,
            is_turbo=turbo,
            model_version="turbo" if turbo else "base",
        ),
        "condition_encoder": AceStepConditionEncoder(
            **_BLOCK,
            text_hidden_dim=1024,
            timbre_hidden_dim=_LATENT,
            num_lyric_encoder_hidden_layers=8,
            num_timbre_encoder_hidden_layers=4,
        ),
        "text_encoder": Qwen3Model(Qwen3Config(**_TEXT, vocab_size=151_669, tie_word_embeddings=True)),
        "vae": AutoencoderOobleck(
            encoder_hidden_size=128,
            downsampling_ratios=[2, 4, 4, 6, 10],
            channel_multiples=[1, 2, 4, 8, 16],
            decoder_channels=128,
            decoder_input_channels=_LATENT,
            audio_channels=2,
            sampling_rate=48_000,
        ),
        "audio_tokenizer": AceStepAudioTokenizer(**_BLOCK, audio_acoustic_hidden_dim=_LATENT, fsq_dim=2048),
        "audio_token_detokenizer": AceStepAudioTokenDetokenizer(**_BLOCK, audio_acoustic_hidden_dim=_LATENT),
    }
