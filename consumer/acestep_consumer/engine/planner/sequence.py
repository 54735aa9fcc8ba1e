# SPDX-License-Identifier: Apache-2.0
"""A sequence in progress, as both backends keep it on the host."""

from dataclasses import dataclass, field

from acestep_consumer.engine.planner.backend import CodeConstraint, Generation, SequenceOutput
from acestep_consumer.engine.planner.token_masks import TextState

NO_TOKEN = -1
"""In a token's place: the logits were not finite."""


@dataclass(slots=True, eq=False)
class TokenSequence:
    """A sequence and its tokens so far. ``text`` is the state of its grammar; None for audio codes."""

    sequence_id: int
    generation: Generation
    tokens: list[int] = field(default_factory=list)
    text: TextState | None = None

    @property
    def rank(self) -> float:
        """Its place among those that wait."""
        return self.generation.rank

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """The prompt, and with guidance the unconditional one: one branch each."""
        generation = self.generation
        guided = generation.unconditional is not None and generation.sampling.cfg_scale != 1
        return (generation.prompt, generation.unconditional or ()) if guided else (generation.prompt,)

    @property
    def max_tokens(self) -> int:
        """The most tokens that it can get."""
        constraint = self.generation.constraint
        return constraint.count if isinstance(constraint, CodeConstraint) else constraint.max_tokens

    @property
    def complete_at_limit(self) -> bool:
        """Whether ``max_tokens`` tokens are a result: codes always, texts when they may be truncated."""
        constraint = self.generation.constraint
        return isinstance(constraint, CodeConstraint) or constraint.truncate

    @property
    def max_length(self) -> int:
        """The most tokens that one of its branches can hold, including the prompt."""
        return max(map(len, self.prompts)) + self.max_tokens

    def refusal(self, vocabulary: int, context: int) -> str | None:
        """Return why no model with this vocabulary and this context can generate it, as public text; None: it can."""
        if not all(self.prompts) or self.max_tokens < 1:
            return "an empty prompt, or no token to generate"
        if any(not 0 <= token < vocabulary for prompt in self.prompts for token in prompt):
            return "the prompt has a token outside the vocabulary"
        if self.max_length > context:
            return f"prompt and text need {self.max_length} tokens; the language model's context is {context}"
        return None

    def advance(self, token: int) -> SequenceOutput | None:
        """Add the next token. Returns the final output when it was the last one."""
        if token == NO_TOKEN:
            return self._output(error="the language model gave no probabilities")
        ended = self.text is not None and self.text.accept(token)
        if not ended:
            self.tokens.append(token)
        if ended or (len(self.tokens) == self.max_tokens and self.complete_at_limit):
            return self._output(tokens=tuple(self.tokens))
        if len(self.tokens) >= self.max_tokens:
            return self._output(error=f"the text has no end within {self.max_tokens} tokens")
        return None

    def length(self, branch: int) -> int:
        """Return the tokens of one of its branches so far, including the prompt."""
        return len(self.prompts[branch]) + len(self.tokens)

    @property
    def progress(self) -> SequenceOutput:
        """The count of its tokens so far."""
        return self._output()

    def _output(self, *, tokens: tuple[int, ...] | None = None, error: str | None = None) -> SequenceOutput:
        return SequenceOutput(self.sequence_id, len(self.tokens), tokens, error)
