# SPDX-License-Identifier: Apache-2.0
"""Grammars of the language model's output, in xgrammar's EBNF.

They end with the answer, so that only the end of the turn is allowed then. Lyrics end when the model ends them.

The form of the text rules decides their cost with a vocabulary of 217,000 tokens. The bounded ``line`` takes seconds to
compile, but as a rule of its own only once per compiler: later grammars take a tenth of a second. Lyrics are one
repeated character class, line breaks included, so that the mask does not depend on earlier tokens. As a list of lines,
each step would take milliseconds.
"""

import json
from collections.abc import Collection
from typing import Final

from acestep_consumer.engine.planner.metadata import FIELDS, Metadata, to_yaml
from acestep_consumer.policy.tiers import MAX_BPM, MAX_DURATION_S, MIN_BPM, MIN_DURATION_S
from acestep_schemas import coerce

MAX_CAPTION_LINES: Final = 10
SONG_FIELDS: Final = tuple(sorted((*FIELDS, "genres")))
"""Fields of the thoughts before lyrics. The model was trained to name genres there."""

_NOTHING_KNOWN: Final = Metadata()

# No control characters, and none that a tag or a code block begins or ends with (< > `): audio codes are ordinary
# tokens of the vocabulary, and would match as plain text. vLLM 0.24 can be installed only beside an xgrammar before
# 0.2.6. That one cannot compile a negated class with characters beyond ASCII, and a range beyond ASCII loses some of
# its characters unless it is split where the first byte of their UTF-8 begins to change.
_ALL_BEYOND_16_BITS = r"\U00010000-\U0003ffff\U00040000-\U000fffff\U00100000-\U0010ffff"
_TEXT_CHARACTERS = (
    r" -;=?-_a-~\xa0-\u07ff\u0800-\u0fff\u1000-\u1fff\u2000-\u2027\u202a-\u2fff\u3000-\ucfff\ud000-\ud7ff\ue000-\uffff"
    + _ALL_BEYOND_16_BITS
)
# Without spaces of any kind.
_FIRST_CHARACTERS = (
    r"!-;=?-_a-~\xa1-\u07ff\u0800-\u0fff\u1000-\u167f\u1681-\u1fff\u2010-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff"
    r"\u3001-\u3fff\u4000-\ucfff\ud000-\ud7ff\ue000-\uefff\uf000-\ufefe\uff00-\uffff" + _ALL_BEYOND_16_BITS
)
# YAML reads a bare `no` as false, and quotes it for that reason. The model may write either.
_LANGUAGES = " | ".join(json.dumps(word) for word in (*coerce.LANGUAGES, "'no'"))

_TEXT = rf"""
caption ::= start line? ("\n  " line){{0,{MAX_CAPTION_LINES - 1}}}
start ::= [{_FIRST_CHARACTERS}]
line ::= [{_TEXT_CHARACTERS}]{{1,120}}
"""
_SONG = rf"""
genres ::= start line?
lyrics ::= start [\n{_TEXT_CHARACTERS}]*
"""
_VALUES = rf"""
keyscale ::= [A-G] ("#" | "b" | "♯" | "♭")? (" major" | " minor")
language ::= {_LANGUAGES}
timesignature ::= [2346]
"""


def metadata_grammar(
    fixed: Metadata = _NOTHING_KNOWN,
    *,
    fields: Collection[str] = FIELDS,
    max_duration_s: int = MAX_DURATION_S,
) -> str:
    """Return the grammar of the metadata phase: thoughts of exactly ``fields``, ending with ``</think>``.

    Known values of ``fixed`` are literals; the others are the model's choice. ``max_duration_s`` bounds a duration that
    the model chooses.
    """
    return f"root ::= {_thoughts(fixed, fields)}\n{_rules(max_duration_s)}"


def song_grammar(
    fixed: Metadata = _NOTHING_KNOWN,
    *,
    fields: Collection[str] = FIELDS,
    max_duration_s: int = MAX_DURATION_S,
) -> str:
    """Return the grammar of sample, format and understand: the same thoughts, then lyrics to the end of the turn.

    Lyrics of ``fixed`` are literals.
    """
    lyrics = "lyrics" if fixed.lyrics is None else _literal(fixed.lyrics)
    root = rf'root ::= {_thoughts(fixed, fields)} "\n\n# Lyric\n" {lyrics}'
    return f"{root}\n{_rules(max_duration_s)}{_SONG}"


def _thoughts(fixed: Metadata, fields: Collection[str]) -> str:
    lines = [_field(fixed, field) for field in sorted(fields)]
    return " ".join([r'"<think>\n"', *(rf'{line} "\n"' for line in lines), '"</think>"'])


def _field(fixed: Metadata, field: str) -> str:
    """Return the grammar of one line of YAML: a literal if it is fixed, else its name and the rule of that name."""
    value = getattr(fixed, field) if field in FIELDS else None
    if value is None:
        return f'"{field}: " {field}'
    return _literal(to_yaml(Metadata(**{field: value})))


def _rules(max_duration_s: int) -> str:
    bpm, duration = _between(MIN_BPM, MAX_BPM), _between(MIN_DURATION_S, max(max_duration_s, MIN_DURATION_S))
    return f"bpm ::= {bpm}\nduration ::= {duration}{_VALUES}{_TEXT}"


def _literal(text: str) -> str:
    # EBNF has JSON's escapes, but no surrogate pairs.
    return json.dumps(text, ensure_ascii=False)


def _between(low: int, high: int) -> str:
    """Return the grammar of the integers from ``low`` to ``high`` without leading zeros."""
    lengths = range(len(str(low)), len(str(high)) + 1)
    parts = (_same_length(str(max(low, 10 ** (n - 1))), str(min(high, 10**n - 1))) for n in lengths)
    return " | ".join(parts)


def _same_length(low: str, high: str) -> str:
    """Return the grammar of a range whose ends have equally many digits, split by the first digit."""
    if low == high:
        return f'"{low}"'
    if len(low) == 1:
        return f"[{low}-{high}]"
    (first, low_rest), (last, high_rest) = (low[0], low[1:]), (high[0], high[1:])
    zeros, nines = "0" * len(low_rest), "9" * len(low_rest)
    if first == last:
        return f'"{first}" ({_same_length(low_rest, high_rest)})'
    if (low_rest, high_rest) == (zeros, nines):
        return f"[{first}-{last}]" + " [0-9]" * len(low_rest)
    parts = []
    if low_rest != zeros:
        parts.append(_same_length(low, first + nines))
        low = str(int(first) + 1) + zeros
    if high_rest != nines:
        parts.append(_same_length(last + zeros, high))
        high = str(int(last) - 1) + nines
    return " | ".join([*parts, *([_same_length(low, high)] if low <= high else [])])
