# SPDX-License-Identifier: Apache-2.0
"""What a language model backend does: writes many sequences at once, a token each per step.

Both backends have this shape, and nothing above it knows which one runs. A backend is driven from one thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. ``cfg_scale`` 1, ``top_k`` 0, ``top_p`` 1 and ``repetition_penalty`` 1 are off.

    ``temperature`` 0 takes the likeliest token. The same seed gives the same tokens, whatever else is being written.
    """

    seed: int
    temperature: float = 0.85
    cfg_scale: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Codes:
    """Write exactly ``count`` audio codes and nothing else."""

    count: int


@dataclass(frozen=True, slots=True)
class Text:
    """Write text that ``grammar`` (EBNF in the form that xgrammar takes) accepts, to its end; None is free text.

    At most ``max_tokens``, the end's own among them; text that is not at its end then is an error, or with ``cut`` as
    good as it is.
    """

    grammar: str | None
    max_tokens: int
    cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One sequence to write. ``unconditional`` is the other prompt of classifier-free guidance, when it is on."""

    prompt: tuple[int, ...]
    unconditional: tuple[int, ...] | None
    constraint: Codes | Text
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Written:
    """News of one sequence: how many tokens it has, and all of them once it is done. ``error`` is public text.

    ``out_of_step``: guidance lost its pair; what was written is void and has to be written again.
    """

    number: int
    count: int
    tokens: tuple[int, ...] | None = None
    error: str | None = None
    out_of_step: bool = False


class Backend(Protocol):
    """Writes sequences. Numbers are the caller's and unique among what is being written."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to write."""

    def add(self, number: int, generation: Generation) -> None:
        """Take a sequence in; it joins the others at the next step, or waits for room."""

    def drop(self, number: int) -> None:
        """Forget a sequence; unknown numbers are ignored."""

    def step(self) -> Sequence[Written]:
        """Write the next token of every sequence; return news of those that moved."""
