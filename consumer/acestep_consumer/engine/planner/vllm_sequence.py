# SPDX-License-Identifier: Apache-2.0
"""Sequences inside vLLM: their state, shared by the backend and the logits processor, and the budget that admits them.

Within the budget vLLM has no reason to delay, split or preempt a request. Nothing here needs vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from acestep_consumer.engine.planner.sequence import TokenSequence
from acestep_consumer.engine.planner.token_masks import TokenMasks


@dataclass(frozen=True, slots=True)
class SequenceCost:
    """Cost of a sequence: ``rows`` of the batch, ``blocks`` of the cache, and ``tokens`` of its first step."""

    rows: int
    blocks: int
    tokens: int


class KvBudget:
    """Free capacity of a batch of ``rows``, ``blocks`` of ``block`` tokens each, and ``step`` tokens per step."""

    def __init__(self, *, rows: int, blocks: int, block: int, step: int) -> None:
        self.rows, self._blocks, self._block, self._step = rows, blocks, block, step
        self._free_rows, self._free_blocks, self._free_tokens = rows, blocks, step

    def cost_of(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> SequenceCost:
        """Return the cost of a sequence until it has ``max_tokens`` new tokens; vLLM allocates one token ahead."""
        blocks = sum(-(-(len(prompt) + max_tokens + 1) // self._block) for prompt in prompts)
        return SequenceCost(len(prompts), blocks, sum(map(len, prompts)))

    @property
    def empty(self) -> bool:
        """Whether nothing is reserved."""
        return (self._free_rows, self._free_blocks) == (self.rows, self._blocks)

    def could_hold(self, cost: SequenceCost) -> bool:
        """Whether the cost fits if nothing else is reserved."""
        return cost.rows <= self.rows and cost.blocks <= self._blocks and cost.tokens <= self._step

    def begin_step(self) -> None:
        """Begin a step: every reserved row reads one token of it; the rest is for new sequences."""
        self._free_tokens = self._step - (self.rows - self._free_rows)

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


@dataclass(slots=True, eq=False)
class VllmSequence:
    """A running sequence: added and removed by the backend, advanced by the logits processor in between.

    ``chosen``: tokens chosen so far. ``read``: how many of them its grammar has accepted; ``ended``: whether the end of
    the text was among them. ``out_of_step`` and ``error`` make it void. ``reported``: the count in its last output.
    """

    sequence: TokenSequence
    cost: SequenceCost
    chosen: int = 0
    read: int = 0
    ended: bool = False
    out_of_step: bool = False
    error: str | None = None
    reported: int = 0

    @property
    def void(self) -> bool:
        """Whether its tokens cannot be used."""
        return self.out_of_step or self.error is not None

    @property
    def done(self) -> bool:
        """Whether no further token has to be chosen."""
        return self.ended or self.void


@dataclass(frozen=True, slots=True)
class SharedState:
    """State shared by the backend and the logits processor.

    ``running`` by sequence id; ``codes``: the audio codes among all ``tokens``; ``masks`` of texts, if any;
    ``compiled``: whether guidance and sampling of codes are compiled by ``torch.compile``.
    """

    running: dict[int, VllmSequence]
    tokens: range
    codes: range
    masks: TokenMasks | None
    compiled: bool = False

    def wanted(self) -> range:
        """Return the tokens that can be chosen at this step: the codes alone, unless a text is generated."""
        if self.running and all(state.sequence.text is None for state in self.running.values()):
            return self.codes
        return self.tokens


def request_tags(sequence_id: int, branch: int) -> dict[str, int]:
    """Return the ``extra_args`` by which the processor identifies a request. Branch 1 is the unconditional one."""
    return {"sequence": sequence_id, "branch": branch}
