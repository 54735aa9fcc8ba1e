# SPDX-License-Identifier: Apache-2.0
"""The interface of language model backends, which generate many sequences together, one token each per step.

Nothing above this interface knows which backend runs. A backend is called from one thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters. ``cfg_scale`` 1, ``top_k`` 0, ``top_p`` 1 and ``repetition_penalty`` 1 are off.

    ``temperature`` 0 is greedy. The same seed gives the same tokens, whatever else is being generated.
    """

    seed: int
    temperature: float = 0.85
    cfg_scale: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class CodeConstraint:
    """Generate exactly ``count`` audio codes and nothing else."""

    count: int


@dataclass(frozen=True, slots=True)
class TextConstraint:
    """Generate text that ``grammar`` (EBNF as xgrammar reads it) accepts, to its end; None is free text.

    At most ``max_tokens``, including the end token. Text that has not ended by then is an error, or is returned as it
    is with ``truncate``.
    """

    grammar: str | None
    max_tokens: int
    truncate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One sequence to generate. ``unconditional`` is the other prompt of classifier-free guidance, when it is on.

    Of the sequences that wait for memory, those of a lower ``rank`` go first.
    """

    prompt: tuple[int, ...]
    unconditional: tuple[int, ...] | None
    constraint: CodeConstraint | TextConstraint
    sampling: Sampling
    rank: float = 0.0


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """Progress of one sequence: the count of its tokens, and all of them once it is finished.

    ``error`` is public text. ``out_of_step``: the two branches of guidance diverged; the sequence is void and has to be
    generated again. ``too_long``: the error is that the prompt, with what is to be generated, exceeds the context.
    """

    sequence_id: int
    count: int
    tokens: tuple[int, ...] | None = None
    error: str | None = None
    out_of_step: bool = False
    too_long: bool = False


class Backend(Protocol):
    """Generates sequences. Their ids are chosen by the caller and unique among those in progress."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to generate."""

    @property
    def songs(self) -> int | None:
        """Guided songs that the batch has rows for; None: only memory bounds it."""

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for memory or for a row of the batch."""

    def add(self, sequence_id: int, generation: Generation) -> None:
        """Add a sequence; it joins the batch at the next step, or once there is memory for it, by its rank."""

    def drop(self, sequence_id: int) -> None:
        """Drop a sequence; unknown ids are ignored."""

    def step(self) -> Sequence[SequenceOutput]:
        """Generate the next token of every sequence. Returns the progress of those that moved."""
