# SPDX-License-Identifier: Apache-2.0
"""The vocabulary: where the audio codes lie, and tokenizers that are not of a 5Hz language model."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from acestep_consumer.domain.audio_codes import CODE_COUNT, format_code
from acestep_consumer.engine.planner import prompts
from acestep_consumer.engine.planner.tokens import LmTokens, TokenizerUnfit


def with_tokens(*added: str) -> Any:
    """A byte-level tokenizer with these tokens, in this order. In the vocabulary itself: that is made much faster."""
    vocabulary = {token: index for index, token in enumerate((*pre_tokenizers.ByteLevel.alphabet(), *added))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


CODES = tuple(map(format_code, range(CODE_COUNT)))


def test_codes_lie_side_by_side_from_the_first_one_on(tokens: LmTokens) -> None:
    ids = tokens.encode(prompts.understand([0, 12, CODE_COUNT - 1]))
    wanted = [tokens.first_code, tokens.first_code + 12, tokens.first_code + CODE_COUNT - 1]
    assert [token for token in ids if token >= tokens.first_code] == wanted
    assert tokens.codes_of(wanted) == (0, 12, CODE_COUNT - 1)
    assert tokens.code_text(wanted) == "<|audio_code_0|><|audio_code_12|><|audio_code_63999|>"


def test_a_vocabulary_may_hold_codes_that_mean_nothing_after_the_others() -> None:
    """As the real one does: its codes go on to 65,534."""
    tokens = LmTokens(with_tokens("<|im_end|>", *CODES, format_code(CODE_COUNT)))
    beyond = tokens.first_code + CODE_COUNT
    with pytest.raises(ValueError, match=f"token {beyond} is not an audio code"):
        tokens.codes_of([beyond])


@pytest.mark.parametrize("offset", [-1, CODE_COUNT])
def test_other_tokens_are_no_codes(tokens: LmTokens, offset: int) -> None:
    with pytest.raises(ValueError, match="is not an audio code"):
        tokens.code_text([tokens.first_code, tokens.first_code + offset])


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (("<|im_end|>",), r"has no token <\|audio_code_0\|>"),
        (("<|im_end|>", *CODES[:-1]), r"<\|audio_code_63999\|> is not at id"),
        (("<|im_end|>", CODES[0], CODES[2], CODES[1], *CODES[3:]), r"<\|audio_code_1\|> is not at id"),
        (CODES, r"has no token <\|im_end\|>"),
    ],
    ids=["no codes", "one code short", "codes out of order", "no end of turn"],
)
def test_a_tokenizer_that_is_not_of_a_5hz_model_is_refused(added: tuple[str, ...], message: str) -> None:
    with pytest.raises(TokenizerUnfit, match=message):
        LmTokens(with_tokens(*added))


def test_a_folder_without_a_tokenizer_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(TokenizerUnfit, match=str(tmp_path)):
        LmTokens.load(tmp_path)


@pytest.mark.parametrize("text", ["<think>\nbpm: 96\n</think>", "naïve 🎵, two  spaces .\n\n", "don ' t , no ."])
def test_decoding_gives_back_what_was_encoded(tokens: LmTokens, text: str) -> None:
    ids = tokens.tokenizer.encode(text, add_special_tokens=False)
    assert tokens.decode(ids) == text


def test_decoding_stops_at_the_end_of_the_turn(tokens: LmTokens) -> None:
    ids = tokens.tokenizer.encode("bpm: 96<|im_end|>\nmore", add_special_tokens=False)
    assert tokens.decode(ids) == "bpm: 96"
