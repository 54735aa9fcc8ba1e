# SPDX-License-Identifier: Apache-2.0
"""Tokenizer of the language model: conversations to token ids, and the ids of the audio codes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from acestep_consumer.domain.audio_codes import CODE_COUNT, format_code, format_codes
from acestep_consumer.engine.planner.prompts import Prompt

END_OF_TURN: Final = "<|im_end|>"
_SPECIAL: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


class TokenizerUnfit(Exception):
    """The folder has no tokenizer of a 5Hz language model. The message says what is missing."""


def _read(folder: Path) -> Any:
    """Read a tokenizer as it was saved.

    ``AutoTokenizer`` builds it anew from the same file, and copies all 64,000 audio codes several times: five times
    as long. It is for folders that have no such file.
    """
    saved, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not (saved.is_file() and settings.is_file()):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config = json.loads(settings.read_text(encoding="utf-8"))
    special = {name: _text_of(config[name]) for name in _SPECIAL if config.get(name) is not None}
    template = folder / "chat_template.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(saved)),
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template"),
        **special,
    )


def _text_of(token: Any) -> str:
    """Return a token's text, of a text or of its description."""
    return str(token["content"] if isinstance(token, dict) else token)


class LmTokens:
    """A tokenizer whose vocabulary has the codes 0 to 63,999 at consecutive ids.

    ``first_code`` is the id of code 0; code N has ``first_code + N``. ``end_of_turn`` ends the model's answer.
    """

    code_count = CODE_COUNT

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.first_code = self._find_codes()
        self.end_of_turn = self._id_of(END_OF_TURN)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load the tokenizer of a checkpoint on disk; nothing is downloaded and no code of the checkpoint is run.

        Raises:
            TokenizerUnfit: there is none, or it is not one of a 5Hz language model.
        """
        try:
            tokenizer = _read(folder)
        except Exception as error:
            raise TokenizerUnfit(f"{folder} has no tokenizer that can be loaded: {error}") from error
        return cls(tokenizer)

    def text_of(self, prompt: Prompt) -> str:
        """Return the conversation as text, which the model continues on a new line.

        Chat templates close every turn; one that the model goes on with is opened again.
        """
        text: str = self.tokenizer.apply_chat_template(
            [asdict(message) for message in prompt.messages],
            tokenize=False,
            add_generation_prompt=prompt.add_generation_prompt,
        )
        if not prompt.add_generation_prompt:
            text = text.rstrip().removesuffix(END_OF_TURN)
        return text if text.endswith("\n") else f"{text}\n"

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of the conversation."""
        return tuple(self.tokenizer.encode(self.text_of(prompt), add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens up to the end of the turn, with tags."""
        ended = tokens.index(self.end_of_turn) if self.end_of_turn in tokens else len(tokens)
        text: str = self.tokenizer.decode(
            list(tokens[:ended]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def codes_of(self, tokens: Iterable[int]) -> tuple[int, ...]:
        """Return the audio codes of tokens.

        Raises:
            ValueError: a token is not an audio code.
        """
        codes = tuple(token - self.first_code for token in tokens)
        invalid = next((number for number in codes if not 0 <= number < CODE_COUNT), None)
        if invalid is not None:
            raise ValueError(f"token {invalid + self.first_code} is not an audio code")
        return codes

    def code_text(self, tokens: Iterable[int]) -> str:
        """Return the audio codes of tokens as text: ``<|audio_code_12|><|audio_code_7|>``. Raises as ``codes_of``."""
        return format_codes(self.codes_of(tokens))

    def _find_codes(self) -> int:
        first = self._id_of(format_code(0))
        found = self.tokenizer.convert_tokens_to_ids([format_code(number) for number in range(CODE_COUNT)])
        wrong = next((number for number, token in enumerate(found) if token != first + number), None)
        if wrong is not None:
            raise TokenizerUnfit(
                f"the tokenizer of a 5Hz language model has codes 0 to {CODE_COUNT - 1:,} at consecutive ids; "
                f"{format_code(wrong)} is not at id {first + wrong}"
            )
        return first

    def _id_of(self, token: str) -> int:
        """Return the id of a text that is a single token of the vocabulary."""
        number = self.tokenizer.convert_tokens_to_ids(token)
        if number is None or number == self.tokenizer.unk_token_id:
            raise TokenizerUnfit(f"the tokenizer has no token {token}: it is not one of a 5Hz language model")
        return int(number)
