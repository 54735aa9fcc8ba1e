# SPDX-License-Identifier: Apache-2.0
"""The tiny language model, loaded from its folder the way a real one is."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from acestep_consumer.domain.audio_codes import CODE_COUNT
from acestep_consumer.engine.planner import prompts
from acestep_consumer.engine.planner.metadata import Metadata
from acestep_consumer.engine.planner.tokens import LmTokens, TokenizerUnfit
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


def test_the_tokenizer_read_as_it_was_saved_is_the_one_of_transformers(folder: Path, tokens: LmTokens) -> None:
    read, plain = tokens.tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert read.get_vocab() == plain.get_vocab()
    assert read.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "all_special_ids"):
        assert getattr(read, name) == getattr(plain, name), name
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}]
    for following in (True, False):
        texts = [
            each.apply_chat_template(turns, tokenize=False, add_generation_prompt=following) for each in (read, plain)
        ]
        assert texts[0] == texts[1]


def test_a_tokenizer_that_describes_its_special_tokens_is_read(folder: Path, tmp_path: Path) -> None:
    """As ACE-Step's files do, which also repeat every token in the settings."""
    shutil.copytree(folder, tmp_path / "lm")
    settings = tmp_path / "lm/tokenizer_config.json"
    config = json.loads(settings.read_text())
    described = {"content": config["eos_token"], "lstrip": False, "normalized": False, "special": True}
    template = (tmp_path / "lm/chat_template.jinja").read_text()
    settings.write_text(json.dumps({**config, "eos_token": described, "bos_token": None, "chat_template": template}))
    (tmp_path / "lm/chat_template.jinja").unlink()
    read = LmTokens.load(tmp_path / "lm")
    assert read.tokenizer.eos_token_id == read.end_of_turn
    assert read.encode(prompts.rewrite("a", "b")) == LmTokens.load(folder).encode(prompts.rewrite("a", "b"))


def test_without_the_file_of_the_whole_tokenizer_the_start_says_so(tmp_path: Path) -> None:
    with pytest.raises(TokenizerUnfit, match="has no tokenizer that can be loaded"):
        LmTokens.load(tmp_path)


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
