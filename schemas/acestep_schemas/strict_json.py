# SPDX-License-Identifier: Apache-2.0
"""Parses untrusted JSON: bounded in depth and size; errors say where."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

MAX_DEPTH: Final = 32
MAX_NODES: Final = 20_000
# Longer ones overflow a float anyway, and converting them to an exact integer costs quadratic time.
_MAX_INTEGER_DIGITS: Final = 400
MAX_REPEATED: Final = 20

# Possessive quantifiers: a long string is matched at once, without memory for backtracking. An unterminated string is
# matched too: else the search would start again at each of its escaped quotes.
_TOKEN: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]|,', re.DOTALL)


class JsonRefused(ValueError):
    """The text is no JSON, or exceeds the bounds. ``str(error)`` says what is wrong and where."""


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed text. ``repeated``: keys that an object holds twice, 20 at most; the last value counts."""

    value: object
    repeated: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, object]:
        """The fields of an object. Raises ``TypeError`` for another value."""
        if not isinstance(self.value, dict):
            raise TypeError(type(self.value))
        return self.value


def loads(text: str) -> Document:
    """Parse JSON text. NaN and Infinity, which Python's own writer makes, are read, as ACE-Step does: as no number.

    Raises:
        JsonRefused: no valid JSON, nested deeper than 32, or more than 20,000 values.
    """
    _check_shape(text)
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return found

    try:
        value = json.loads(text, object_pairs_hook=collect, parse_int=_integer)
    except json.JSONDecodeError as exc:
        raise JsonRefused(f"{exc.msg} at {_place(text, exc.pos)}") from None
    return Document(value, tuple(dict.fromkeys(repeated))[:MAX_REPEATED])


def _check_shape(text: str) -> None:
    """Check depth and number of values before the parser recurses. Raises ``JsonRefused``."""
    depth, nodes = 0, 0
    for token in _TOKEN.finditer(text):
        match token.group()[0]:
            case "[" | "{":
                depth, nodes = depth + 1, nodes + 1
            case "]" | "}":
                depth -= 1
            case ",":
                nodes += 1
        if depth > MAX_DEPTH:
            raise JsonRefused(f"nested deeper than {MAX_DEPTH} levels at {_place(text, token.start())}")
        if nodes > MAX_NODES:
            raise JsonRefused(f"more than {MAX_NODES:,} values at {_place(text, token.start())}")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_INTEGER_DIGITS else float(digits)


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"
