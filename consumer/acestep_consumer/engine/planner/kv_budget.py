# SPDX-License-Identifier: Apache-2.0
"""Budget of vLLM's batch and key-value cache: within it, vLLM has no reason to delay, split or preempt a request."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SequenceCost:
    """Cost of a sequence: ``rows`` of the batch, ``blocks`` of the cache, and ``tokens`` of its first step."""

    rows: int
    blocks: int
    tokens: int


class KvBudget:
    """Free capacity of a batch of ``rows``, ``blocks`` of ``block`` tokens each, and ``step`` tokens per step."""

    def __init__(self, *, rows: int, blocks: int, block: int, step: int) -> None:
        self._rows, self._blocks, self._block, self._step = rows, blocks, block, step
        self._free_rows, self._free_blocks, self._free_tokens = rows, blocks, step

    def cost_of(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> SequenceCost:
        """Return the cost of a sequence until it has ``max_tokens`` new tokens; vLLM allocates one token ahead."""
        blocks = sum(-(-(len(prompt) + max_tokens + 1) // self._block) for prompt in prompts)
        return SequenceCost(len(prompts), blocks, sum(map(len, prompts)))

    @property
    def empty(self) -> bool:
        """Whether nothing is reserved."""
        return (self._free_rows, self._free_blocks) == (self._rows, self._blocks)

    def could_hold(self, cost: SequenceCost) -> bool:
        """Whether the cost fits if nothing else is reserved."""
        return cost.rows <= self._rows and cost.blocks <= self._blocks and cost.tokens <= self._step

    def begin_step(self) -> None:
        """Begin a step: every reserved row reads one token of it; the rest is for new sequences."""
        self._free_tokens = self._step - (self._rows - self._free_rows)

    def reserve(self, cost: SequenceCost) -> bool:
        """Reserve the cost if it fits in this step. Returns whether it did."""
        if cost.rows > self._free_rows or cost.blocks > self._free_blocks or cost.tokens > self._free_tokens:
            return False
        self._free_rows -= cost.rows
        self._free_blocks -= cost.blocks
        self._free_tokens -= cost.tokens
        return True

    def release(self, cost: SequenceCost) -> None:
        """Release a reserved cost."""
        self._free_rows += cost.rows
        self._free_blocks += cost.blocks
