# SPDX-License-Identifier: Apache-2.0
"""Tiny 5Hz language model for a laptop and a test: Qwen3 with random weights and a byte-level tokenizer.

It has everything that the planner relies on: the form of the chat template, the control tokens, and 64,000 audio codes
at consecutive ids.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from acestep_consumer.domain.audio_codes import CODE_COUNT, format_code

NAME = "acestep-5Hz-lm-0.6B"
_END_OF_TEXT, _END_OF_TURN = "<|endoftext|>", "<|im_end|>"
_CONTROL = (_END_OF_TEXT, "<|im_start|>", _END_OF_TURN)
_TAGS = ("<think>", "</think>")
# A few tokens of two characters, some across boundaries of the grammar: real vocabularies have many.
_PAIRS = (("Ċ", "Ċ"), (".", "Ċ"), (":", "Ġ"), ("m", "a"), ("m", "i"), ("Ċ", "Ġ"), ("1", "2"), ("ĊĠ", "Ġ"))

# As in Qwen3's template, thoughts are between single line breaks and followed by an empty line.
_TEMPLATE = """\
{%- for message in messages %}
    {%- set said = message.content %}
    {%- if message.role == 'assistant' and '</think>' in said %}
        {%- set thought, answer = said.split('</think>', 1) %}
        {%- set said = '<think>\\n' + thought.split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n'
                       + answer.lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_README = f"""\
# {NAME}, tiny, with random weights

Made by `acestep-consumer tiny-checkpoint`. The architecture is that of ACE-Step 1.5's language model, the weights are
random numbers: its plans mean nothing. Use it to try out and test the worker, and a real checkpoint for music.
"""


def write(folder: Path, notify: Callable[[str], None] = lambda _: None) -> Path:
    """Write the model below ``folder``, which can then be ``ACESTEP_CHECKPOINT_DIR``; return its own folder.

    The weights are drawn from a fixed seed, so that the same versions of torch and transformers write the same
    numbers. Files that are there already are overwritten. About 12 MB.
    """
    target = folder / NAME
    notify(f"writing {NAME} with random weights")
    tokenizer = make_tokenizer()
    with _quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _model(tokenizer).to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
    for file in target.glob("*.json"):
        _pack(file)
    (target / "README.md").write_text(_README, encoding="utf-8")
    return target


def make_tokenizer() -> Any:
    """Return a tokenizer of all bytes, a few pairs, the control tokens and tags, and the audio codes."""
    bytewise = Tokenizer(models.BPE(vocab=_vocabulary(), merges=list(_PAIRS)))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens([AddedToken(token, special=True) for token in _CONTROL])
    # The real one keeps these when special tokens are skipped.
    bytewise.add_tokens([AddedToken(token, normalized=False) for token in _TAGS])
    bytewise.add_tokens([AddedToken(format_code(number), normalized=False) for number in range(CODE_COUNT)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token=_END_OF_TURN, pad_token=_END_OF_TEXT, chat_template=_TEMPLATE
    )


def _vocabulary() -> dict[str, int]:
    tokens = (*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in _PAIRS))
    return {token: index for index, token in enumerate(tokens)}


def _model(tokenizer: Any) -> Any:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        # The minimum of vLLM's attention on a CPU.
        head_dim=32,
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
        # Large enough that a layer's output outweighs the residual: otherwise the likeliest next token of a model with
        # tied embeddings would always be the last one.
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """Show no progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pack(file: Path) -> None:
    """Rewrite JSON without white space, which is most of a list of 64,000 tokens."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
