# SPDX-License-Identifier: Apache-2.0
"""The tiny language model, loaded from its folder the way a real one is."""

import copy
import copyreg
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from acestep_consumer.domain.audio_codes import CODE_COUNT
from acestep_consumer.engine.planner import prompts
from acestep_consumer.engine.planner.metadata import Metadata
from acestep_consumer.engine.planner.tokens import LmTokens
from acestep_consumer.engine.testing import tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.write(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def tokens(folder: Path) -> LmTokens:
    return LmTokens.load(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def likeliest_codes(model: Any, tokens: LmTokens, prompt: prompts.Prompt, count: int) -> list[int]:
    """Greedy decoding over the audio codes, each step from the beginning: nothing that could be wrong with a cache."""
    ids = list(tokens.encode(prompt))
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([ids])).logits[0, -1, tokens.first_code :]
            ids.append(tokens.first_code + int(logits.argmax()))
    return ids[-count:]


def test_it_is_named_like_the_smallest_real_one_and_small(folder: Path) -> None:
    assert folder.name == "acestep-5Hz-lm-0.6B"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 14_000_000


def test_it_is_a_tied_qwen3_of_bf16_weights(folder: Path, model: Any, tokens: LmTokens) -> None:
    stored = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert (stored.dtype, stored.config.architectures) == (torch.bfloat16, ["Qwen3ForCausalLM"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(model.lm_head.weight) == len(tokens.tokenizer) == tokens.first_code + CODE_COUNT
    assert model.generation_config.eos_token_id == tokens.end_of_turn


def test_the_tokenizer_of_the_folder_is_the_one_that_was_made(tokens: LmTokens) -> None:
    made = LmTokens(tiny_lm.make_tokenizer())
    prompt = prompts.codes_phase("a: b\n\n", "12 makes\n  3.\n", Metadata(bpm=96, caption="x")).conditional
    assert tokens.encode(prompt) == made.encode(prompt)
    assert (tokens.first_code, tokens.end_of_turn) == (made.first_code, made.end_of_turn)


def test_loading_with_shared_added_tokens_gives_the_tokenizer_of_transformers(folder: Path, tokens: LmTokens) -> None:
    plain = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokens.tokenizer.get_vocab() == plain.get_vocab()
    assert tokens.tokenizer.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    assert copy.deepcopy(AddedToken("x", special=True)) == AddedToken("x", special=True)
    assert AddedToken not in copyreg.dispatch_table


def test_control_tokens_and_tags_are_one_token_each(tokens: LmTokens) -> None:
    for token in ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|audio_code_63999|>"):
        assert len(tokens.tokenizer.encode(token, add_special_tokens=False)) == 1


def test_what_it_writes_hangs_on_what_it_is_told(model: Any, tokens: LmTokens) -> None:
    """Otherwise a test could not tell a guided sequence from an unguided one, nor one job's from another's."""
    pair = prompts.codes_phase("warm piano", "la la", Metadata(bpm=96))
    other = prompts.codes_phase("warm piano", "oh oh", Metadata(bpm=96))
    written = [
        likeliest_codes(model, tokens, each, 12) for each in (pair.conditional, pair.unconditional, other.conditional)
    ]
    assert len({tuple(codes) for codes in written}) == 3
    assert all(len(set(codes)) > 8 for codes in written)


def test_the_same_weights_are_written_every_time(folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    again = tiny_lm.write(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert fingerprints(again) == fingerprints(folder)


def fingerprints(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
