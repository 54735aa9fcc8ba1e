# SPDX-License-Identifier: Apache-2.0
"""What the device knows of the rows of a batch, and how their songs choose their next tokens.

All of it follows from what the host knows. It is built when songs come or go, and carried on from step to step in
between.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from acestep_consumer.engine.planner.guidance import Rows, choose, guide
from acestep_consumer.engine.planner.sequence import NOTHING, TokenSequence
from acestep_consumer.engine.planner.token_masks import TokenMasks, masked

Row = tuple[TokenSequence, int]
"""A row of the batch: which song, and which of its prompts."""


@dataclass(frozen=True, slots=True, eq=False)
class VocabularySlice:
    """The part ``ids`` of the vocabulary that songs choose from, and the language model's head for it.

    ``weight`` [ids, channels], ``bias`` [ids] or None. ``masks``: for texts, what allows their tokens.
    """

    ids: range
    weight: Tensor
    bias: Tensor | None
    masks: TokenMasks | None


class RowTable:
    """The rows' next tokens ``ids`` and how many they have read, ``positions``; int64 [rows] both."""

    def __init__(self, rows: Sequence[Row], groups: Sequence["RowGroup"], unread: int, device: torch.device) -> None:
        """``unread``: how many of each row's tokens the model has yet to read, 1 at the start of a step, then 0."""
        last = [song.tokens[-1] if song.tokens else 0 for song, _ in rows]
        self.ids = torch.tensor(last, device=device)
        self.positions = torch.tensor([song.length(branch) - unread for song, branch in rows], device=device)
        self._groups = groups

    def advance(self, hidden: Tensor) -> dict[TokenSequence, int]:
        """Choose every song's next token from the rows' hidden states [rows, channels]. Waits for the device."""
        chosen = [group.choose(hidden) for group in self._groups]
        for group, tokens in zip(self._groups, chosen, strict=True):
            group.spread(tokens, self.ids)
        songs = [song for group in self._groups for song in group.songs]
        return dict(zip(songs, torch.cat(chosen).tolist(), strict=True))


class RowGroup:
    """Songs that choose from one part of the vocabulary."""

    def __init__(self, songs: Sequence[TokenSequence], rows: Sequence[Row], part: VocabularySlice) -> None:
        device = part.weight.device
        row_of = {pair: row for row, pair in enumerate(rows)}
        conditional = [row_of[song, 0] for song in songs]
        # A song without guidance is its own unconditional.
        unconditional = [row_of.get((song, 1), row_of[song, 0]) for song in songs]
        own = sorted({*conditional, *unconditional})
        place = {row: index for index, row in enumerate(own)}
        self.songs = songs
        self._part = part
        self._guided = conditional != unconditional
        self._own = torch.tensor(own, device=device)
        pairs = [[place[row] for row in side] for side in (conditional, unconditional)]
        self._pairs = torch.tensor(pairs, device=device)
        self._sampling = Rows.of((song.generation.sampling for song in songs), device)
        self._steps = torch.tensor([len(song.tokens) for song in songs], device=device)
        self._seen = _seen(songs, part.ids, device) if self._sampling.penalised else None
        self._table = None if part.masks is None else part.masks.table(len(songs), device)

    def choose(self, hidden: Tensor) -> Tensor:
        """The next token of every song, int64 [songs], from the hidden states of all rows; -1 where there is none."""
        logits = self._logits(hidden)
        columns = choose(logits, self._sampling, self._steps, self._seen, self._part.ids.start)
        self._steps += 1
        if self._seen is not None:
            self._seen.scatter_(1, columns[:, None], value=True)
        return torch.where(logits.amax(-1).isfinite(), columns + self._part.ids.start, NOTHING)

    def spread(self, tokens: Tensor, ids: Tensor) -> None:
        """Give each song's token to its rows in ``ids`` [rows]."""
        for side in self._pairs:
            ids[self._own[side]] = tokens

    def _logits(self, hidden: Tensor) -> Tensor:
        """Guided logits that only allow what may come next; [songs, ids]."""
        logits = functional.linear(hidden[self._own], self._part.weight, self._part.bias)
        guided = logits[self._pairs[0]]
        if self._guided:
            guided = guide(guided, logits[self._pairs[1]], self._sampling.scale)
        if self._table is None:
            return guided
        # The host looks the grammars up while the device is still busy with the model.
        for row, song in enumerate(self.songs):
            if song.text is not None:
                song.text.fill(self._table, row)
        return masked(guided, self._table.to(guided.device, non_blocking=True))


def _seen(songs: Iterable[TokenSequence], ids: range, device: torch.device) -> Tensor:
    """Which of the tokens ``ids`` are in each song's prompt or have been written; bool [songs, ids]."""
    known = [{*song.generation.prompt, *song.tokens} for song in songs]
    at = [(row, token - ids.start) for row, tokens in enumerate(known) for token in tokens if token in ids]
    seen = torch.zeros(len(known), len(ids), dtype=torch.bool)
    if at:
        seen[tuple(torch.tensor(at).T)] = True
    return seen.to(device)
