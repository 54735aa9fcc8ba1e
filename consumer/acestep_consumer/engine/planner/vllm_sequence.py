# SPDX-License-Identifier: Apache-2.0
"""A song that vLLM is writing, as the backend and the logits processor share it. Needs no vLLM."""

from dataclasses import dataclass

from acestep_consumer.engine.planner.kv_budget import SequenceCost
from acestep_consumer.engine.planner.sequence import TokenSequence
from acestep_consumer.engine.planner.token_masks import TokenMasks


@dataclass(slots=True, eq=False)
class VllmSequence:
    """A song under way: the backend puts it in and takes it out, the processor carries it on in between.

    ``chosen``: how many tokens have been chosen. ``read``: how many of them its grammar has seen; ``ended``: whether
    the end of the text was among them. ``out_of_step`` and ``error`` say that it is void, and why. ``told``: how many
    tokens its last news spoke of.
    """

    song: TokenSequence
    need: SequenceCost
    chosen: int = 0
    read: int = 0
    ended: bool = False
    out_of_step: bool = False
    error: str | None = None
    told: int = 0

    @property
    def void(self) -> bool:
        """Whether what has been written is worth nothing."""
        return self.out_of_step or self.error is not None

    @property
    def done(self) -> bool:
        """Whether nothing has to be chosen for it any more."""
        return self.ended or self.void


@dataclass(frozen=True, slots=True)
class SharedState:
    """What the backend and the processor share.

    ``drafts`` by number; ``codes``, the audio codes among the ``tokens``; the ``masks`` of texts, if any;
    ``compiled``: whether guidance and draw of codes go through ``torch.compile``.
    """

    drafts: dict[int, VllmSequence]
    tokens: range
    codes: range
    masks: TokenMasks | None
    compiled: bool = False


def tag(number: int, branch: int) -> dict[str, int]:
    """What a request carries (``extra_args``) so that the processor knows it again. Branch 1 is the unconditional."""
    return {"song": number, "branch": branch}
