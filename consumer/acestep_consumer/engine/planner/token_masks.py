# SPDX-License-Identifier: Apache-2.0
"""Grammar-constrained decoding: masks of the allowed next tokens, from xgrammar."""

from typing import Any

import torch
import xgrammar
from torch import Tensor

from acestep_consumer.engine.planner.guidance import MASKED

_COMPILED_LIMIT_BYTES = 256 << 20
"""Grammars contain the request's own values: without a limit, the cache of compiled ones would only grow."""


class GrammarRefused(Exception):
    """The grammar is invalid."""


def end_tokens(tokenizer: Any, more: int | list[int] | None) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and ``more``, those of the model's generation config."""
    ends = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    if not ends:
        raise ValueError("the tokenizer has no end token")
    return frozenset(ends)


class TokenMasks:
    """Compiles grammars for one vocabulary. ``width``: the number of logits, at least the tokenizer's size."""

    def __init__(self, tokenizer: Any, width: int, ends: frozenset[int]) -> None:
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=width, stop_token_ids=sorted(ends))
        self._compiler = xgrammar.GrammarCompiler(info, cache_limit_bytes=_COMPILED_LIMIT_BYTES)
        self.ends = ends
        known = torch.zeros(_words(width) * 32, dtype=torch.bool)
        known[: min(len(tokenizer), width)] = True
        self._known = _pack(known)

    def start(self, grammar: str | None) -> "TextState":
        """Return the state of a new text. Raises ``GrammarRefused``."""
        if grammar is None:
            return TextState(None, self._known, self.ends)
        try:
            compiled = self._compiler.compile_grammar(grammar)
        except RuntimeError as error:
            raise GrammarRefused(str(error)) from error
        return TextState(xgrammar.GrammarMatcher(compiled), self._known, self.ends)

    def table(self, rows: int, device: torch.device) -> Tensor:
        """Return an empty table of masks on the host; int32 [rows, words of 32 tokens]."""
        return torch.zeros(rows, len(self._known), dtype=torch.int32, pin_memory=device.type == "cuda")


class TextState:
    """The state of one text in its grammar; without a grammar every token of the vocabulary is allowed."""

    def __init__(self, matcher: xgrammar.GrammarMatcher | None, known: Tensor, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._known = known
        self._ends = ends

    def fill(self, table: Tensor, row: int) -> None:
        """Write the mask of the allowed next tokens into a row."""
        table[row] = self._known
        if self._matcher is not None:
            self._matcher.fill_next_token_bitmask(table, row)

    def accept(self, token: int) -> bool:
        """Accept the next token. Returns whether it ends the text. Raises ``ValueError`` if it is not allowed."""
        if self._matcher is not None and not self._matcher.accept_token(token):
            raise ValueError(f"token {token} was not allowed here")  # the logits were not finite
        return token in self._ends


def masked(logits: Tensor, table: Tensor) -> Tensor:
    """Return the logits [n, v], −inf where the table [n, words] has no bit set."""
    bits = (table[:, :, None] >> torch.arange(32, dtype=torch.int32, device=table.device)) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, MASKED)


def _words(width: int) -> int:
    return -(-width // 32)


def _pack(bits: Tensor) -> Tensor:
    """Pack bools, a multiple of 32 of them, as the bits of int32 words, the lowest first."""
    values = bits.reshape(-1, 32).long() << torch.arange(32)
    return values.sum(-1).to(torch.int32)
