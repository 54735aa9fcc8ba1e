# SPDX-License-Identifier: Apache-2.0
"""Batch state on the device: the rows' tokens and positions, and the sampling of their sequences.

All of it follows from the host's state. It is built when sequences join or leave, and updated in place in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from acestep_consumer.engine.planner.guidance import RowSampling, choose, guide, seen_tokens
from acestep_consumer.engine.planner.sequence import NO_TOKEN, TokenSequence
from acestep_consumer.engine.planner.token_masks import TokenMasks, masked

Row = tuple[TokenSequence, int]
"""A row of the batch: a sequence, and one of its branches (the index of its prompt)."""


@dataclass(frozen=True, slots=True, eq=False)
class VocabularySlice:
    """The part ``ids`` of the vocabulary that sequences choose from, and the language model's head for it.

    ``weight`` [ids, channels], ``bias`` [ids] or None. ``masks``: for texts, the masks of their grammars.
    """

    ids: range
    weight: Tensor
    bias: Tensor | None
    masks: TokenMasks | None


class RowTable:
    """The rows' next tokens, ``ids``, and the number of tokens read, ``positions``; int64 [rows] both."""

    def __init__(self, rows: Sequence[Row], groups: Sequence["RowGroup"], unread: int, device: torch.device) -> None:
        """``unread``: tokens of each row that the model has not read, 1 at the start of a step, then 0."""
        last = [sequence.tokens[-1] if sequence.tokens else 0 for sequence, _ in rows]
        self.ids = torch.tensor(last, device=device)
        self.positions = torch.tensor([sequence.length(branch) - unread for sequence, branch in rows], device=device)
        self._groups = groups

    def advance(self, hidden: Tensor) -> dict[TokenSequence, int]:
        """Choose every sequence's next token from the hidden states [rows, channels]. Waits for the device."""
        chosen = [group.choose(hidden) for group in self._groups]
        for group, tokens in zip(self._groups, chosen, strict=True):
            group.write_to_rows(tokens, self.ids)
        sequences = [sequence for group in self._groups for sequence in group.sequences]
        return dict(zip(sequences, torch.cat(chosen).tolist(), strict=True))


class RowGroup:
    """Sequences that choose from the same part of the vocabulary."""

    def __init__(self, sequences: Sequence[TokenSequence], rows: Sequence[Row], vocabulary: VocabularySlice) -> None:
        device = vocabulary.weight.device
        row_of = {pair: row for row, pair in enumerate(rows)}
        conditional = [row_of[sequence, 0] for sequence in sequences]
        # Without guidance a sequence is its own unconditional branch.
        unconditional = [row_of.get((sequence, 1), row_of[sequence, 0]) for sequence in sequences]
        used_rows = sorted({*conditional, *unconditional})
        index_of = {row: index for index, row in enumerate(used_rows)}
        self.sequences = sequences
        self._vocabulary = vocabulary
        self._guided = conditional != unconditional
        self._used_rows = torch.tensor(used_rows, device=device)
        pairs = [[index_of[row] for row in side] for side in (conditional, unconditional)]
        self._pairs = torch.tensor(pairs, device=device)
        self._sampling = RowSampling.of((sequence.generation.sampling for sequence in sequences), device)
        self._steps = torch.tensor([len(sequence.tokens) for sequence in sequences], device=device)
        self._seen = None
        if self._sampling.penalised:
            known = [{*sequence.generation.prompt, *sequence.tokens} for sequence in sequences]
            self._seen = seen_tokens(known, vocabulary.ids).to(device)
        self._mask_table = None if vocabulary.masks is None else vocabulary.masks.table(len(sequences), device)

    def choose(self, hidden: Tensor) -> Tensor:
        """Return the next token of every sequence, int64 [sequences], from all rows' hidden states; -1 for none."""
        logits = self._logits(hidden)
        columns = choose(logits, self._sampling, self._steps, self._seen, self._vocabulary.ids.start)
        self._steps += 1
        if self._seen is not None:
            self._seen.scatter_(1, columns[:, None], value=True)
        return torch.where(logits.amax(-1).isfinite(), columns + self._vocabulary.ids.start, NO_TOKEN)

    def write_to_rows(self, tokens: Tensor, ids: Tensor) -> None:
        """Write each sequence's token to its rows in ``ids`` [rows]."""
        for side in self._pairs:
            ids[self._used_rows[side]] = tokens

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return guided logits with the grammars' masks applied; [sequences, ids]."""
        logits = functional.linear(hidden[self._used_rows], self._vocabulary.weight, self._vocabulary.bias)
        guided = logits[self._pairs[0]]
        if self._guided:
            guided = guide(guided, logits[self._pairs[1]], self._sampling.scale)
        if self._mask_table is None:
            return guided
        # The host computes the masks while the device is still busy with the model.
        for row, sequence in enumerate(self.sequences):
            if sequence.text is not None:
                sequence.text.fill(self._mask_table, row)
        return masked(guided, self._mask_table.to(guided.device, non_blocking=True))
