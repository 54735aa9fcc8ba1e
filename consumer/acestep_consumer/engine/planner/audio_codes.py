# SPDX-License-Identifier: Apache-2.0
"""The spellings that the language model's tokenizer reads as single tokens, and text of strangers without them."""

import re
from typing import Final

THINK, END_THINK = "<think>", "</think>"
END_OF_TURN: Final = "<|im_end|>"
CODE_COUNT: Final = 64_000
"""Audio codes that mean a sound: 0 to 63,999. A vocabulary may hold a few more; they mean nothing."""

_READ_AS_ONE = re.compile(r"<(?=\||/?(?:think|tool_call|tool_response)>)")
_UNENCODABLE = re.compile(r"[\ud800-\udfff]")


def code(number: int) -> str:
    """An audio code as text, such as ``<|audio_code_12|>``."""
    return f"<|audio_code_{number}|>"


def without_control_tokens(text: str) -> str:
    """The same text for a reader, but none of its words is a control token, and it can be encoded as UTF-8.

    A caption that says ``<|im_end|>`` would end its own message, and one with ``</think>`` the model's thoughts.
    """
    return _UNENCODABLE.sub("\N{REPLACEMENT CHARACTER}", _READ_AS_ONE.sub("< ", text))
