# SPDX-License-Identifier: Apache-2.0
"""Looks up the fields of a request in its body: under any of their names, in the body and its nested objects.

Nothing is dropped silently: unknown fields, and values that another one outranks, become warnings.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Final

from acestep_schemas.aliases import METAS, NO_COUNTERPART, PARAM_OBJ
from acestep_schemas.strict_json import JsonRefused, loads

# ACE-Step writes "N/A" for these where it knows no value, and clients send that back.
_METADATA: Final = frozenset({"bpm", "key_scale", "time_signature", "audio_duration"})
_MAX_SHOWN: Final = 100
_MAX_UNKNOWN: Final = 50
_MAX_GUESSED: Final = 64
_LONG_NAME: Final = 10
_MAX_ODD_LETTERS: Final = 4
_OTHER_WORDS: Final = frozenset({"steps"})
"""Names that other programs have for something else than the field that they are nearly spelt as."""


@dataclass(frozen=True, slots=True)
class Found:
    """A value and its path in the body, such as ``metas.keyscale``."""

    path: str
    value: object


@dataclass(frozen=True, slots=True)
class Broken:
    """A nested object that cannot be parsed."""

    field: str
    value: object
    rule: str


@dataclass(frozen=True, slots=True)
class Source:
    """One object to look in. ``prefix`` is its path; ``repeated`` are keys that its JSON text holds twice."""

    prefix: str
    values: Mapping[str, object]
    repeated: tuple[str, ...] = ()


class FieldNames:
    """The names of all fields. ``names`` maps each to its own name and its aliases, highest rank first."""

    def __init__(self, names: Mapping[str, tuple[str, ...]]) -> None:
        self.owners = {name: field for field, own in names.items() for name in own}
        self.ranks = {name: rank for own in names.values() for rank, name in enumerate(own)}
        self.order = {field: place for place, field in enumerate(names)}


class Lookup:
    """A body with its nested objects, and what each field is given in them."""

    def __init__(self, body: Mapping[str, object], names: FieldNames) -> None:
        self._owners = names.owners
        self._containers = tuple(_containers(body))
        opened = [_open(name, body[name]) for name in self._containers]
        self.broken = tuple(part for part in opened if isinstance(part, Broken))
        self._sources = (Source("", body), *(part for part in opened if isinstance(part, Source)))
        self.hits = self._find(names)
        """Every value of each field that is given; the first one counts."""

    def _find(self, names: FieldNames) -> dict[str, list[Found]]:
        found: dict[str, list[tuple[int, Found]]] = {}
        for source in self._sources:
            here: dict[str, list[tuple[int, Found]]] = {}
            for name, value in source.values.items():
                field = names.owners.get(name)
                if field is not None and not _absent(field, value):
                    here.setdefault(field, []).append((names.ranks[name], Found(source.prefix + name, value)))
            for field, some in here.items():
                found.setdefault(field, []).extend(sorted(some, key=_rank))
        ordered = sorted(found, key=names.order.__getitem__)
        return {field: [hit for _, hit in found[field]] for field in ordered}

    def warnings(self) -> Iterator[str]:
        """Yield a warning for everything that was given and is not used."""
        for source in self._sources:
            for key in source.repeated:
                yield f"'{shown(source.prefix + key)}' is given twice: the last one counts"
        yield from self._outranked()
        yield from self._without_counterpart()
        yield from self._unknown()

    def _outranked(self) -> Iterator[str]:
        for hits in self.hits.values():
            ignored = [repr(hit.path) for hit in hits[1:] if hit.value != hits[0].value]
            if ignored:
                yield f"{', '.join(ignored)} is ignored: {hits[0].path!r} outranks it"

    def _unread(self) -> Iterator[tuple[Source, str]]:
        for source in self._sources:
            for key in source.values:
                if key not in self._owners and (source.prefix or not self._opened(key)):
                    yield source, key

    def _opened(self, key: str) -> bool:
        """Whether a key of the body is a nested object that was parsed, or an empty one."""
        return key in self._containers or (key in (PARAM_OBJ, *METAS) and _empty(self._sources[0].values[key]))

    def _without_counterpart(self) -> Iterator[str]:
        for source, key in self._unread():
            if key in NO_COUNTERPART and not blank(source.values[key]):
                yield f"'{source.prefix}{key}' is ignored: {NO_COUNTERPART[key]}"

    def _unknown(self) -> Iterator[str]:
        unknown = [(source, key) for source, key in self._unread() if key not in NO_COUNTERPART]
        for source, key in unknown[:_MAX_UNKNOWN]:
            yield f"unknown field '{shown(source.prefix + key)}' is ignored{self._guess(key)}"
        if len(unknown) > _MAX_UNKNOWN:
            yield f"{len(unknown) - _MAX_UNKNOWN:,} more unknown fields are ignored"

    def _guess(self, key: str) -> str:
        """Return a suggestion when a known name is spelled nearly so; of a long key only the beginning is compared."""
        if key in METAS and self._containers:
            return f": '{self._containers[-1]}' was read"
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key[:_MAX_GUESSED]).lower()
        close = get_close_matches(snake, self._owners, n=1, cutoff=0.8)
        return f"; did you mean '{self._owners[close[0]]}'?" if close and _misspelled(snake, close[0]) else ""


def _misspelled(written: str, known: str) -> bool:
    """Whether one name is a misspelling of the other, and not another word of the same kind.

    The first letter is the same, and at most 2 letters are too many or missing, 4 in a long name; a wrong one is both.
    """
    if written[:1] != known[:1] or written in _OTHER_WORDS:
        return False
    letters = len(written) + len(known)
    odd = letters - round(SequenceMatcher(None, written, known).ratio() * letters)
    return odd <= (_MAX_ODD_LETTERS if len(known) >= _LONG_NAME else 2)


def shown(value: object) -> str:
    """Return at most 100 printable characters of a value, for messages."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return _brief(value)[:_MAX_SHOWN]
    excerpt = value if len(value) <= _MAX_SHOWN else value[: _MAX_SHOWN - 1] + "…"
    return printable(excerpt)[:_MAX_SHOWN]


def printable(text: str) -> str:
    """Return a text with JSON's escapes in place of what cannot be printed."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _brief(value: object) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:  # Python prints no integer of thousands of digits
        return "a very large number"


def _brief_repr() -> reprlib.Repr:
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 40
    return brief


_REPR: Final = _brief_repr()


def _rank(found: tuple[int, Found]) -> int:
    return found[0]


def _containers(body: Mapping[str, object]) -> Iterator[str]:
    """Yield the names of the nested objects to look in: ``param_obj``, then one of the metadata objects."""
    if not _empty(body.get(PARAM_OBJ)):
        yield PARAM_OBJ
    yield from [name for name in METAS if not _empty(body.get(name))][:1]


def _open(name: str, value: object) -> Source | Broken:
    repeated: tuple[str, ...] = ()
    if isinstance(value, str):
        try:
            document = loads(value)
        except JsonRefused as exc:
            return Broken(name, value, f"must be an object, or JSON text of one: {exc}")
        value, repeated = document.value, document.repeated
    if not isinstance(value, Mapping):
        return Broken(name, value, "must be an object, or JSON text of one")
    return Source(f"{name}.", value, repeated)


def blank(value: object) -> bool:
    """Whether a value is None or blank text, which mean "not given"."""
    return value is None or (isinstance(value, str) and not value.strip())


def _empty(value: object) -> bool:
    return blank(value) or value == {}


def _absent(field: str, value: object) -> bool:
    if field in _METADATA and isinstance(value, str) and value.strip().upper() == "N/A":
        return True
    return value is None
