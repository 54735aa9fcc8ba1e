# SPDX-License-Identifier: Apache-2.0
"""Songs for the language model's backends, the same for each: long and short, guided or not, codes and texts."""

import json
import random
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xgrammar
from safetensors.torch import load_file, save_file
from torch import Tensor

from acestep_consumer.engine.planner.backend import (
    Backend,
    CodeConstraint,
    Generation,
    Sampling,
    SequenceOutput,
    TextConstraint,
)
from acestep_consumer.engine.planner.guidance import RowSampling, choose

CONTEXT = 512
"""Tokens of the tiny model's context."""
GRAMMAR = 'root ::= "bpm: " [1-9] [0-9] [0-9]? "\\nkey: " [A-G] ("#" | "b")? " " ("major" | "minor") "\\n"'
WRITTEN_BY_GRAMMAR = re.compile(r"bpm: [1-9][0-9]{1,2}\nkey: [A-G][#b]? (major|minor)\n")
STEPS = 2000
"""More steps than any test needs: a backend that never ends a song fails instead of hanging."""


def without_prefix(folder: Path, target: Path) -> Path:
    """Copy a checkpoint, saved as the class without head: no tensor's name begins with ``model.``."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3Model"]}), encoding="utf-8")
    return target


def prompt(length: int, seed: int) -> tuple[int, ...]:
    """So many tokens of the byte alphabet, the same for the same seed."""
    return tuple(random.Random(seed * 1000 + length).choices(range(250), k=length))  # noqa: S311 - no secret


def song(seed: int, *, count: int = 20, length: int = 30, guided: bool = True, **sampling: Any) -> Generation:
    """A song of ``count`` codes after a prompt of ``length`` tokens."""
    return Generation(
        prompt=prompt(length, seed),
        unconditional=prompt(max(1, length // 3), seed + 1000) if guided else None,
        constraint=CodeConstraint(count),
        sampling=Sampling(seed=seed, cfg_scale=2.0 if guided else 1.0, **{"top_p": 0.9, **sampling}),
    )


def text(seed: int, *, max_tokens: int = 60, grammar: str | None = GRAMMAR, **sampling: Any) -> Generation:
    """A text as the grammar has it, if there is one."""
    return replace(song(seed, **sampling), constraint=TextConstraint(grammar, max_tokens))


FAULTY = pytest.mark.parametrize(
    ("poison", "words"),
    [
        pytest.param(song(1, length=CONTEXT, count=1), "context is 512", id="a prompt over the context"),
        pytest.param(song(1, length=100, count=CONTEXT - 99), "context is 512", id="a text over the context"),
        pytest.param(replace(song(1), prompt=()), "empty prompt", id="no prompt"),
        pytest.param(replace(song(1), unconditional=()), "empty prompt", id="no unconditional prompt"),
        pytest.param(
            replace(song(1), prompt=(5, 10**6)), "outside the vocabulary", id="a token outside the vocabulary"
        ),
        pytest.param(replace(song(1), unconditional=(-1,)), "outside the vocabulary", id="a negative token"),
        pytest.param(song(1, count=0), "no token to generate", id="nothing to write"),
        pytest.param(text(1, grammar="root ::= ("), "grammar is invalid", id="a broken grammar"),
    ],
)
"""Sequences that no backend can write, and words of the error."""


def mixture() -> list[Generation]:
    """Every kind of song: long and short, guided or not, codes and texts, all samplings."""
    return [
        song(1, count=31, length=40),
        song(2, count=5, length=3, guided=False),
        text(3),
        song(4, count=17, length=90, temperature=0),
        song(5, count=40, length=11, top_k=20, top_p=1.0),
        text(6, guided=False, length=55, temperature=1.5),
        song(7, count=23, length=64, repetition_penalty=1.3),
        song(8, count=1, length=20),
    ]


def finish(backend: Backend, found: dict[int, SequenceOutput] | None = None) -> dict[int, SequenceOutput]:
    """Step until nothing is left; the last news of each sequence."""
    last = dict(found or {})
    for _ in range(STEPS):
        if backend.idle:
            return last
        last.update((news.sequence_id, news) for news in backend.step())
    raise AssertionError("the backend does not come to an end")


def write(backend: Backend, *generations: Generation) -> list[tuple[int, ...] | None]:
    """What each of these writes when they begin together; None for one that failed."""
    for number, generation in enumerate(generations):
        backend.add(number, generation)
    last = finish(backend)
    return [last[number].tokens for number in range(len(generations))]


def write_at_odd_times(backend: Backend, generations: Sequence[Generation]) -> list[tuple[int, ...] | None]:
    """What each of these writes when the last one begins, and the others join one after the other."""
    last: dict[int, SequenceOutput] = {}
    for number, generation in reversed(list(enumerate(generations))):
        backend.add(number, generation)
        for _ in range(1 + number % 3):
            last.update((news.sequence_id, news) for news in backend.step())
    last = finish(backend, last)
    return [last[number].tokens for number in range(len(generations))]


def greedy_songs() -> list[Generation]:
    return [song(seed, count=25, length=10 + 17 * seed, temperature=0) for seed in range(4)]


def greedy_codes(plain: Any, generation: Generation, codes: range) -> tuple[int, ...]:
    """The 25 codes that plain calls of the model make likeliest."""
    expected: list[int] = []
    for _ in range(25):
        logits = plain_sum(plain, generation, expected)
        expected.append(codes.start + int(logits[codes.start : codes.stop].argmax()))
    return tuple(expected)


def sampled_codes(plain: Any, generation: Generation, codes: range) -> tuple[int, ...]:
    """The 25 codes that are drawn from the logits of plain calls of the model."""
    rows = RowSampling.of([generation.sampling], "cpu")
    expected: list[int] = []
    for step in range(25):
        logits = plain_sum(plain, generation, expected)[None, codes.start : codes.stop]
        seen = torch.tensor([[token in expected for token in codes]])
        expected.append(codes.start + int(choose(logits, rows, torch.tensor([step]), seen, codes.start)))
    return tuple(expected)


def greedy_text(plain: Any, tokenizer: Any, generation: Generation) -> tuple[int, ...]:
    """The text that plain calls of the model make likeliest under ``GRAMMAR``, without the token that ends it."""
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=plain.config.vocab_size)
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_grammar(GRAMMAR))
    mask = xgrammar.allocate_token_bitmask(1, plain.config.vocab_size)
    expected: list[int] = []
    while not matcher.is_terminated():
        matcher.fill_next_token_bitmask(mask)
        logits = plain_sum(plain, generation, expected)
        xgrammar.apply_token_bitmask_inplace(logits[None], mask)
        expected.append(int(logits.argmax()))
        assert matcher.accept_token(expected[-1])
    return tuple(expected[:-1])


@torch.inference_mode()
def plain_sum(model: Any, generation: Generation, written: Iterable[int]) -> Tensor:
    """The guided logits, u + s (c − u), from whole passes over whole sequences, no cache, no batch."""
    assert generation.unconditional is not None
    pair = (generation.prompt, generation.unconditional)
    c, u = (model(torch.tensor([[*ids, *written]])).logits[0, -1] for ids in pair)
    guided: Tensor = u + generation.sampling.cfg_scale * (c - u)
    return guided
