# SPDX-License-Identifier: Apache-2.0
"""Tiny DiT checkpoints: the real classes of ACE-Step 1.5 with random weights, small enough for a laptop and a test.

Their songs are noise. They exist so that everything from request to audio file can be run anywhere. Two models are
written, as an operator would have them: a turbo and a base, which share text encoder and VAE as the real ones do.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from acestep_consumer.engine.renderer.lyrics.lyric_alignment import CONFIG
from acestep_consumer.engine.renderer.quiet_imports import quietly

TURBO, BASE = "acestep-v15-turbo", "acestep-v15-base"
_END = "<|endoftext|>"
_README = """\
# {name}, tiny, with random weights

Made by `acestep-consumer tiny-checkpoint`. The architecture is that of ACE-Step 1.5, the weights are random numbers:
the songs are noise. Use it to try out and test the worker, and a real checkpoint for music.
"""

# 64 in the real model. The VAE's encoder has twice as many channels, at the full sample rate: it dominates covers.
_LATENT_CHANNELS = 4
_WIDTH = 32
_ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_BLOCK: dict[str, Any] = {"hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, **_ATTENTION}


def write(folder: Path, notify: Callable[[str], None] = lambda _: None) -> tuple[Path, Path]:
    """Write both checkpoints below ``folder``, which can then be ``ACESTEP_CHECKPOINT_DIR``.

    The weights are drawn from fixed seeds, so that the same versions of torch and diffusers write the same numbers.
    Files that are there already are overwritten. Returns the two folders, turbo first.
    """
    folders = folder / TURBO, folder / BASE
    with quietly():
        with _private_randomness(0):
            shared = {"vae": _vae(), "text_encoder": _text_encoder(), "tokenizer": tokenizer()}
        for target, turbo in zip(folders, (True, False), strict=True):
            notify(f"writing {target.name} with random weights")
            AceStepPipeline(**shared, **_own_parts(turbo=turbo)).save_pretrained(target)
            _name_alignment_heads(target / "transformer" / "config.json")
            (target / "README.md").write_text(_README.format(name=target.name), encoding="utf-8")
    return folders


def _name_alignment_heads(path: Path) -> None:
    """Name the heads that follow the singing in a DiT's config: ACE-Step's own are in layers that it does not have."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config[CONFIG] = {"0": [1], "1": [2, 3]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _private_randomness(seed: int) -> Iterator[None]:
    """Draw weights from a fixed seed and restore the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _own_parts(*, turbo: bool) -> dict[str, Any]:
    """Return the components that turbo and base do not share: the DiT and everything trained with it."""
    with _private_randomness(1 if turbo else 2):
        parts = {
            "transformer": _transformer(turbo=turbo),
            "condition_encoder": _condition_encoder(),
            "audio_tokenizer": AceStepAudioTokenizer(
                **_BLOCK, audio_acoustic_hidden_dim=_LATENT_CHANNELS, fsq_dim=_WIDTH
            ),
            "audio_token_detokenizer": AceStepAudioTokenDetokenizer(
                **_BLOCK, audio_acoustic_hidden_dim=_LATENT_CHANNELS
            ),
        }
    # ACE-Step computes its own schedule, which the scheduler uses unchanged.
    return {**parts, "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)}


def _transformer(*, turbo: bool) -> Any:
    return AceStepTransformer1DModel(
        **_BLOCK,
        num_hidden_layers=2,
        in_channels=3 * _LATENT_CHANNELS,
        audio_acoustic_hidden_dim=_LATENT_CHANNELS,
        encoder_hidden_size=_WIDTH,
        is_turbo=turbo,
        model_version="turbo" if turbo else "base",
    )


def _condition_encoder() -> Any:
    encoder = AceStepConditionEncoder(
        **_BLOCK,
        text_hidden_dim=_WIDTH,
        timbre_hidden_dim=_LATENT_CHANNELS,
        num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2,
    )
    # In a real checkpoint this is encoded silence; zeros would hide errors in its use.
    encoder.silence_latent.normal_(std=0.5)
    return encoder


def _text_encoder() -> Any:
    return Qwen3Model(
        Qwen3Config(
            **_BLOCK, num_hidden_layers=2, vocab_size=len(_vocabulary()), tie_word_embeddings=True, use_cache=False
        )
    )


def _vae() -> Any:
    """Return a VAE with the real hop of 1,920 samples (25 latents a second at 48 kHz), and few channels.

    The largest factor is the one beside the audio: nearly all time goes into the blocks at high sample rates.
    """
    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * _LATENT_CHANNELS,
        downsampling_ratios=[10, 6, 4, 4, 2],
        channel_multiples=[1, 1, 1, 1, 1],
        decoder_channels=8,
        decoder_input_channels=_LATENT_CHANNELS,
        audio_channels=2,
        sampling_rate=48_000,
    )
    # Random biases would outweigh the latents: every seed would give the same tone.
    for name, parameter in vae.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return vae


def _vocabulary() -> dict[str, int]:
    """Return a vocabulary of all bytes and one end token."""
    return {token: index for index, token in enumerate((*sorted(pre_tokenizers.ByteLevel.alphabet()), _END))}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer, which needs no download."""
    bytewise = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens([AddedToken(_END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=_END, pad_token=_END)
