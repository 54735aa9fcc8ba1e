# SPDX-License-Identifier: Apache-2.0
"""Prompts of the language model, word for word as in its training: a conversation for each purpose.

Control tokens in texts of the request are broken up first, so that no caption or lyric can contain one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from acestep_consumer.domain.audio_codes import format_codes
from acestep_consumer.engine.planner.metadata import Metadata, think_block, without_control_tokens
from acestep_schemas.request import INSTRUMENTAL

GENERATE: Final = "Generate audio semantic tokens based on the given conditions:"
UNDERSTAND: Final = "Understand the given musical conditions and describe the audio semantics accordingly:"
INSPIRE: Final = "Expand the user's input into a more detailed and specific musical description:"
REWRITE: Final = "Format the user's input into a more detailed and specific musical description:"
NOTHING: Final = "NO USER INPUT"
"""Stands for a text that the user left out; as a negative prompt it means none."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that the model continues.

    After a user's turn it begins an answer; an assistant's turn at the end is left open, and it writes on there.
    """

    messages: tuple[Message, ...]

    @property
    def add_generation_prompt(self) -> bool:
        """Whether the chat template has to open the model's turn."""
        return self.messages[-1].role != "assistant"


@dataclass(frozen=True, slots=True)
class GuidedPrompts:
    """The two prompts of classifier-free guidance."""

    conditional: Prompt
    unconditional: Prompt


def metadata_phase(caption: str, lyrics: str) -> Prompt:
    """Return the prompt for metadata. It has no guidance, which distorts texts and cuts captions short."""
    return _prompt(GENERATE, _song(caption, lyrics))


def codes_phase(caption: str, lyrics: str, metadata: Metadata, negative: str = "") -> GuidedPrompts:
    """Return the prompts for audio codes, with the metadata as the model's own thoughts.

    The unconditional one has empty thoughts on the negative prompt alone, or on none: with the caption or the lyrics in
    both prompts, guidance would not steer towards them.
    """
    unconditional = without_control_tokens(negative) if _is_given(negative) else NOTHING
    return GuidedPrompts(
        _prompt(GENERATE, _song(caption, lyrics), think_block(metadata)),
        _prompt(GENERATE, unconditional, think_block(Metadata())),
    )


def sample(query: str, *, instrumental: bool) -> Prompt:
    """Return the prompt for a whole song (metadata and lyrics) from a description of it."""
    instrumental_text = "true" if instrumental else "false"
    return _prompt(INSPIRE, f"{_text_or(NOTHING, query)}\n\ninstrumental: {instrumental_text}")


def rewrite(caption: str, lyrics: str) -> Prompt:
    """Return the prompt for a better caption, metadata and well-formed lyrics."""
    return _prompt(REWRITE, _song(_text_or(NOTHING, caption), _text_or(INSTRUMENTAL, lyrics)).removesuffix("\n"))


def understand(codes: Iterable[int]) -> Prompt:
    """Return the prompt for the metadata and lyrics of a song given as audio codes, 0 to 63,999."""
    return _prompt(UNDERSTAND, format_codes(codes))


def _prompt(instruction: str, user: str, assistant: str | None = None) -> Prompt:
    messages = (Message("system", f"# Instruction\n{instruction}\n\n"), Message("user", user))
    return Prompt(messages if assistant is None else (*messages, Message("assistant", assistant)))


def _song(caption: str, lyrics: str) -> str:
    return f"# Caption\n{without_control_tokens(caption)}\n\n# Lyric\n{without_control_tokens(lyrics)}\n"


def _text_or(otherwise: str, text: str) -> str:
    return without_control_tokens(text) if text.strip() else otherwise


def _is_given(negative: str) -> bool:
    return negative.strip() not in ("", NOTHING)
