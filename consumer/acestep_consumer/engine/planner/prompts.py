# SPDX-License-Identifier: Apache-2.0
"""What is said to the language model, word for word as it was trained: a conversation for each purpose.

Texts of the request are made harmless first, so that no caption or lyric can forge a control token.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from acestep_consumer.engine.planner.audio_codes import code, harmless
from acestep_consumer.engine.planner.metadata import Metadata, thought

GENERATE: Final = "Generate audio semantic tokens based on the given conditions:"
UNDERSTAND: Final = "Understand the given musical conditions and describe the audio semantics accordingly:"
INSPIRE: Final = "Expand the user's input into a more detailed and specific musical description:"
REWRITE: Final = "Format the user's input into a more detailed and specific musical description:"
NOTHING: Final = "NO USER INPUT"
"""Stands for a text that the user left out; as a negative prompt it means that there is none."""
INSTRUMENTAL: Final = "[Instrumental]"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that the model goes on from.

    It begins an answer of its own when the user spoke last. After a turn of its own it goes on in the next line.
    """

    messages: tuple[Message, ...]

    @property
    def asks(self) -> bool:
        """Whether the model's turn has to be opened: the chat template's ``add_generation_prompt``."""
        return self.messages[-1].role != "assistant"


@dataclass(frozen=True, slots=True)
class GuidedPrompts:
    """The two prompts of classifier-free guidance."""

    conditional: Prompt
    unconditional: Prompt


def metadata_phase(caption: str, lyrics: str, negative: str = "") -> GuidedPrompts:
    """Ask for metadata. Away from it leads the negative prompt, or the lyrics without any caption."""
    away = _song(negative, lyrics) if _says_something(negative) else _lyrics(lyrics)
    return GuidedPrompts(_prompt(GENERATE, _song(caption, lyrics)), _prompt(GENERATE, away))


def codes_phase(caption: str, lyrics: str, metadata: Metadata, negative: str = "") -> GuidedPrompts:
    """Ask for audio codes, with the metadata as the model's own thoughts.

    Away from them lead empty thoughts on the negative prompt, or on the same caption when there is none.
    """
    away = negative if _says_something(negative) else caption
    return GuidedPrompts(
        _prompt(GENERATE, _song(caption, lyrics), thought(metadata)),
        _prompt(GENERATE, _song(away, lyrics), thought(Metadata())),
    )


def sample(query: str, *, instrumental: bool) -> Prompt:
    """Ask for a whole song (metadata and lyrics) from a description of it."""
    sung = "true" if instrumental else "false"
    return _prompt(INSPIRE, f"{_or(NOTHING, query)}\n\ninstrumental: {sung}")


def rewrite(caption: str, lyrics: str) -> Prompt:
    """Ask for a better caption, metadata and well-formed lyrics."""
    return _prompt(REWRITE, _song(_or(NOTHING, caption), _or(INSTRUMENTAL, lyrics)).removesuffix("\n"))


def understand(codes: Iterable[int]) -> Prompt:
    """Ask for the metadata and lyrics of the song that these audio codes (0 to 63,999) are."""
    return _prompt(UNDERSTAND, "".join(map(code, codes)))


def _prompt(instruction: str, asked: str, answered: str | None = None) -> Prompt:
    said = (Message("system", f"# Instruction\n{instruction}\n\n"), Message("user", asked))
    return Prompt(said if answered is None else (*said, Message("assistant", answered)))


def _song(caption: str, lyrics: str) -> str:
    return f"# Caption\n{harmless(caption)}\n\n{_lyrics(lyrics)}"


def _lyrics(lyrics: str) -> str:
    return f"# Lyric\n{harmless(lyrics)}\n"


def _or(otherwise: str, text: str) -> str:
    return harmless(text) if text.strip() else otherwise


def _says_something(negative: str) -> bool:
    return negative.strip() not in ("", NOTHING)
