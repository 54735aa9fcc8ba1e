# SPDX-License-Identifier: Apache-2.0
"""One sequence in the transformers backend, as the host knows it."""

from dataclasses import dataclass, field

from acestep_consumer.engine.planner.backend import Codes, Generation, Written
from acestep_consumer.engine.planner.token_masks import TextState

NOTHING = -1
"""In a token's place: the logits held no number to choose."""


@dataclass(slots=True, eq=False)
class TokenSequence:
    """A sequence and what it has written. ``text``: how far it is in its grammar, when it is text."""

    number: int
    generation: Generation
    tokens: list[int] = field(default_factory=list)
    text: TextState | None = None

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """One, or two when it is guided: with the unconditional one."""
        generation = self.generation
        guided = generation.unconditional is not None and generation.sampling.cfg_scale != 1
        return (generation.prompt, generation.unconditional or ()) if guided else (generation.prompt,)

    @property
    def wanted(self) -> int:
        """The most tokens that it will write."""
        constraint = self.generation.constraint
        return constraint.count if isinstance(constraint, Codes) else constraint.max_tokens

    @property
    def may_stop(self) -> bool:
        """Whether as many tokens as wanted are a whole: codes always, texts when they may be cut."""
        constraint = self.generation.constraint
        return isinstance(constraint, Codes) or constraint.cut

    @property
    def width(self) -> int:
        """The most tokens that one of its rows will hold."""
        return max(map(len, self.prompts)) + self.wanted

    def advance(self, token: int) -> Written | None:
        """Take the next token; return the last news when it was the last one."""
        if token == NOTHING:
            return Written(self.number, len(self.tokens), error="the language model gave no probabilities")
        ended = self.text is not None and self.text.accept(token)
        if not ended:
            self.tokens.append(token)
        if ended or (len(self.tokens) == self.wanted and self.may_stop):
            return Written(self.number, len(self.tokens), tokens=tuple(self.tokens))
        if len(self.tokens) >= self.wanted:
            return Written(self.number, len(self.tokens), error=f"the text has no end within {self.wanted} tokens")
        return None

    def length(self, branch: int) -> int:
        """How many tokens one of its rows has by now, the prompt's among them."""
        return len(self.prompts[branch]) + len(self.tokens)

    @property
    def news(self) -> Written:
        """How far it is."""
        return Written(self.number, len(self.tokens))
