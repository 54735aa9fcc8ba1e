# SPDX-License-Identifier: Apache-2.0
"""State of sequences inside vLLM, shared by the backend and the logits processor. Needs no vLLM."""

from dataclasses import dataclass

from acestep_consumer.engine.planner.kv_budget import SequenceCost
from acestep_consumer.engine.planner.sequence import TokenSequence
from acestep_consumer.engine.planner.token_masks import TokenMasks


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


def request_tags(sequence_id: int, branch: int) -> dict[str, int]:
    """Return the ``extra_args`` by which the processor identifies a request. Branch 1 is the unconditional one."""
    return {"sequence": sequence_id, "branch": branch}
