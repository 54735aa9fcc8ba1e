# SPDX-License-Identifier: Apache-2.0
"""How much vLLM can hold, so that it is never given more: then it has no reason to delay, split or evict a request."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SequenceCost:
    """What a song takes: ``rows`` of the batch, ``blocks`` of keys and values, and ``tokens`` of its first step."""

    rows: int
    blocks: int
    tokens: int


class KvBudget:
    """Counts what is free: of the batch's ``rows``, of the ``blocks`` of ``block`` tokens, of a ``step``'s tokens."""

    def __init__(self, *, rows: int, blocks: int, block: int, step: int) -> None:
        self._rows, self._blocks, self._block, self._step = rows, blocks, block, step
        self._free_rows, self._free_blocks, self._free_tokens = rows, blocks, step

    def need(self, prompts: Sequence[Sequence[int]], wanted: int) -> SequenceCost:
        """What a song with these prompts takes until it has written ``wanted`` tokens; vLLM plans one token ahead."""
        blocks = sum(-(-(len(prompt) + wanted + 1) // self._block) for prompt in prompts)
        return SequenceCost(len(prompts), blocks, sum(map(len, prompts)))

    @property
    def empty(self) -> bool:
        """Whether nothing is taken."""
        return (self._free_rows, self._free_blocks) == (self._rows, self._blocks)

    def could_hold(self, need: SequenceCost) -> bool:
        """Whether there would be room if nothing else was there."""
        return need.rows <= self._rows and need.blocks <= self._blocks and need.tokens <= self._step

    def begin_step(self) -> None:
        """A new step: every row that is there reads one token; the rest is for newcomers."""
        self._free_tokens = self._step - (self._rows - self._free_rows)

    def take(self, need: SequenceCost) -> bool:
        """Take the room, if there is enough for it in this step; return whether there was."""
        if need.rows > self._free_rows or need.blocks > self._free_blocks or need.tokens > self._free_tokens:
            return False
        self._free_rows -= need.rows
        self._free_blocks -= need.blocks
        self._free_tokens -= need.tokens
        return True

    def leave(self, need: SequenceCost) -> None:
        """Give the room back."""
        self._free_rows += need.rows
        self._free_blocks += need.blocks
