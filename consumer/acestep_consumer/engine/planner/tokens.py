# SPDX-License-Identifier: Apache-2.0
"""The language model's vocabulary: conversations to token ids, and where in it the audio codes lie."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer

from acestep_consumer.engine.planner.audio_codes import CODE_COUNT, END_OF_TURN, code
from acestep_consumer.engine.planner.prompts import Prompt


class TokenizerUnfit(Exception):
    """The folder holds no tokenizer of a 5Hz language model. The text says what is missing."""


class LmTokens:
    """A tokenizer whose vocabulary holds the codes 0 to 63,999 side by side.

    ``first_code`` is the id of code 0; code N has ``first_code + N``. ``end_of_turn`` ends the model's answer.
    """

    code_count = CODE_COUNT

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.first_code = self._find_codes()
        self.end_of_turn = self._id_of(END_OF_TURN)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load the tokenizer of a checkpoint on this disk; nothing is fetched and no code of the checkpoint runs.

        Raises:
            TokenizerUnfit: there is none, or it is not that of a 5Hz language model.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TokenizerUnfit(f"{folder} holds no tokenizer that can be loaded: {error}") from error
        return cls(tokenizer)

    def text_of(self, prompt: Prompt) -> str:
        """The conversation as the model reads it. It goes on in a new line."""
        text: str = self.tokenizer.apply_chat_template(
            [asdict(message) for message in prompt.messages], tokenize=False, add_generation_prompt=prompt.asks
        )
        return text if text.endswith("\n") else f"{text}\n"

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of the conversation."""
        return tuple(self.tokenizer.encode(self.text_of(prompt), add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of what the model wrote, up to the end of its turn. Tags stay as they are."""
        ended = tokens.index(self.end_of_turn) if self.end_of_turn in tokens else len(tokens)
        text: str = self.tokenizer.decode(
            list(tokens[:ended]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def codes_of(self, tokens: Iterable[int]) -> tuple[int, ...]:
        """Audio codes of tokens.

        Raises:
            ValueError: a token is no audio code.
        """
        codes = tuple(token - self.first_code for token in tokens)
        stranger = next((number for number in codes if not 0 <= number < CODE_COUNT), None)
        if stranger is not None:
            raise ValueError(f"token {stranger + self.first_code} is no audio code")
        return codes

    def code_text(self, tokens: Iterable[int]) -> str:
        """Audio codes as the renderer takes them: ``<|audio_code_12|><|audio_code_7|>``. Raises as ``codes_of``."""
        return "".join(map(code, self.codes_of(tokens)))

    def _find_codes(self) -> int:
        first = self._id_of(code(0))
        found = self.tokenizer.convert_tokens_to_ids([code(number) for number in range(CODE_COUNT)])
        wrong = next((number for number, token in enumerate(found) if token != first + number), None)
        if wrong is not None:
            raise TokenizerUnfit(
                f"the tokenizer of a 5Hz language model has codes 0 to {CODE_COUNT - 1:,} side by side; "
                f"{code(wrong)} is not where it should be (token {first + wrong})"
            )
        return first

    def _id_of(self, token: str) -> int:
        """The id of one token; only what the vocabulary holds as a whole counts."""
        number = self.tokenizer.convert_tokens_to_ids(token)
        if number is None or number == self.tokenizer.unk_token_id:
            raise TokenizerUnfit(f"the tokenizer knows no {token}: it is not that of a 5Hz language model")
        return int(number)
