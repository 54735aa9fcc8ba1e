# SPDX-License-Identifier: Apache-2.0
"""Metadata of a song, and the YAML between ``<think>`` tags in which the language model reads and writes it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import yaml

from acestep_consumer.policy.tiers import MAX_BPM, MAX_DURATION_S, MIN_BPM, MIN_DURATION_S
from acestep_schemas import coerce

THINK, END_THINK = "<think>", "</think>"
FIELDS: Final = ("bpm", "caption", "duration", "keyscale", "language", "timesignature")
"""Keys of the YAML, in their order."""

_RANGES: Final = {"bpm": (MIN_BPM, MAX_BPM), "duration": (MIN_DURATION_S, MAX_DURATION_S)}
_CONTROL_TOKEN = re.compile(r"<(?=\||/?(?:think|tool_call|tool_response)>)")
_UNENCODABLE = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LYRIC_HEADING = re.compile(r"\s*#[ ]*lyrics?[ ]*\n", re.IGNORECASE)
_READ: Final[dict[str, Callable[[object], object]]] = {
    "bpm": coerce.integer,
    "caption": coerce.text,
    "duration": coerce.integer,
    "keyscale": coerce.key_scale,
    "language": coerce.language,
    "timesignature": coerce.time_signature,
}


class MetadataError(ValueError):
    """Invalid metadata, or text without metadata. The message names the field and the rule."""


class AsGiven(str):
    """A key, time signature or language of the request that the model was not trained on: ``D dorian``, ``5/4``.

    It is one line without control tokens, and taken letter for letter; the model itself never writes one.
    """

    __slots__ = ()


class TempoAsGiven(int):
    """A tempo of the request that the model was not trained on, taken as it is."""

    __slots__ = ()


_GIVEN: Final = (AsGiven, TempoAsGiven)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """Metadata of a song; None is unknown, and every known value is valid, or ``AsGiven``.

    ``duration`` is in whole seconds. ``caption`` is one line: white space and control characters become single spaces,
    and a blank one is unknown. ``lyrics`` and ``genres`` are not part of the YAML; the model writes the
    lyrics after its thoughts, and genres in those of a whole song.

    Raises:
        MetadataError: a value is out of its range.
    """

    bpm: int | None = None
    caption: str | None = None
    duration: int | None = None
    keyscale: str | None = None
    language: str | None = None
    timesignature: str | None = None
    lyrics: str | None = None
    genres: str | None = None

    def __post_init__(self) -> None:
        # The way to set a field of a frozen class while it is made.
        object.__setattr__(self, "caption", _one_line(self.caption or "") or None)
        object.__setattr__(self, "genres", _one_line(self.genres or "") or None)
        for field in self.known_fields:
            self._check(field)

    @property
    def known_fields(self) -> tuple[str, ...]:
        """Names of the YAML's fields that have a value, in order."""
        return tuple(field for field in FIELDS if getattr(self, field) is not None)

    def _check(self, field: str) -> None:
        value = getattr(self, field)
        if isinstance(value, _GIVEN):
            return
        if field in _RANGES:
            low, high = _RANGES[field]
            if not low <= value <= high:
                raise MetadataError(f"{field} = {value}: must be {low} to {high}")
        elif (read := _read(field, value)) != value:
            raise MetadataError(f"{field} = {value}: must be written {read}")


def to_yaml(metadata: Metadata) -> str:
    """Return the known fields as YAML, exactly as in the model's training; empty when nothing is known.

    Keys are sorted, numbers are bare, and lines longer than 80 columns are wrapped with an indent of two spaces. Of a
    time signature the beats are written: ``5`` for 5/4.
    """
    values = {field: getattr(metadata, field) for field in metadata.known_fields}
    plain = {"bpm": int, "keyscale": str, "language": str}  # YAML's writer knows no classes of ours
    values |= {field: plain[field](values[field]) for field in plain.keys() & values}
    if metadata.timesignature is not None:
        beats = metadata.timesignature.partition("/")[0].strip()
        values["timesignature"] = int(beats) if beats.isdecimal() else str(metadata.timesignature)
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=True).strip() if values else ""


def think_block(metadata: Metadata) -> str:
    """Return the YAML between its tags; with nothing known, the empty thoughts of an unconditional prompt."""
    return "\n".join(line for line in (THINK, to_yaml(metadata), END_THINK) if line)


def as_given(field: str, value: str | None) -> str | None:
    """Return a key, time signature or language of the request: as in training, else ``AsGiven``, or None."""
    line = _one_line(value or "")
    try:
        known = _READ[field](line) == line
    except ValueError:
        known = False
    return line if known else AsGiven(line) if line else None


def tempo_as_given(bpm: int | None) -> int | None:
    """Return a tempo of the request: as it is in the range of the model's training, else ``TempoAsGiven``, or None."""
    return bpm if bpm is None or MIN_BPM <= bpm <= MAX_BPM else TempoAsGiven(bpm)


def parse(text: str, fixed: Metadata | None = None) -> Metadata:
    """Parse the model's output: its thoughts and the lyrics after them, if any.

    Tags may be missing, lines may be wrapped anywhere, and unknown fields are ignored. What is ``AsGiven`` in ``fixed``
    stays, since the grammar has put it there.

    Raises:
        MetadataError: there is no known field, or one with an invalid value.
    """
    thoughts, _, rest = text.partition(END_THINK)
    stays = {field: value for field in FIELDS if isinstance(value := getattr(fixed, field, None), _GIVEN)}
    found = _fields(thoughts.rpartition(THINK)[2])
    genres = _unquoted(found.pop("genres")) if "genres" in found else None
    values = {field: stays[field] if field in stays else _read(field, _unquoted(raw)) for field, raw in found.items()}
    if not values:
        raise MetadataError(f"there is no metadata in {text[:100]!r}")
    lyrics = _LYRIC_HEADING.sub("", rest, count=1).strip()
    return Metadata(**values, lyrics=lyrics or None, genres=genres)  # type: ignore[arg-type]  # each reader returns its field's type


def without_control_tokens(text: str) -> str:
    """Return the same text for a reader, but without control tokens, and such that it can be encoded as UTF-8.

    A caption with ``<|im_end|>`` would end its own message, and one with ``</think>`` the model's thoughts.
    """
    return _UNENCODABLE.sub("\N{REPLACEMENT CHARACTER}", _CONTROL_TOKEN.sub("< ", text))


def _one_line(text: str) -> str:
    return without_control_tokens(" ".join(_CONTROL.sub(" ", text).split()))


def _fields(thoughts: str) -> dict[str, str]:
    """Return each field's text after the colon, with the lines that continue it."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in thoughts.split("\n"):
        key, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            current = [value]
            found.setdefault(key.strip().lower(), current)
        else:
            current.append(line)
    return {field: raw for field in (*FIELDS, "genres") if (raw := "\n".join(found.get(field, ())).strip())}


def _unquoted(raw: str) -> str:
    """Return a scalar without YAML's quotes. A text that only begins with a quote is returned as it is."""
    if raw[0] not in "'\"":
        return raw
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        return raw
    return value if isinstance(value, str) else raw


def _read(field: str, value: object) -> object:
    try:
        return _READ[field](value)
    except ValueError as error:
        raise MetadataError(f"{field} = {value}: {error}") from None
