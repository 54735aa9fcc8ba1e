# SPDX-License-Identifier: Apache-2.0
"""What the language model knows of a song, and the YAML between ``<think>`` tags that it was trained to write."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import yaml

from acestep_consumer.engine.planner.audio_codes import END_THINK, THINK, harmless
from acestep_consumer.policy.tiers import MAX_BPM, MAX_DURATION_S, MIN_BPM, MIN_DURATION_S
from acestep_schemas import coerce

FIELDS: Final = ("bpm", "caption", "duration", "keyscale", "language", "timesignature")
"""Lines of the YAML, in the order in which they are written."""

_RANGES: Final = {"bpm": (MIN_BPM, MAX_BPM), "duration": (MIN_DURATION_S, MAX_DURATION_S)}
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
    """Metadata that no song can have, or text that holds none. The text names the field and the rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """A song's metadata; None is not known. What is known is valid.

    ``duration`` is whole seconds. ``caption`` is one line: white space and control characters become single spaces,
    and a blank one is not known. ``lyrics`` are no part of the YAML; the model writes them after its thoughts.

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

    def __post_init__(self) -> None:
        # The way to set a field of a frozen class while it is made.
        object.__setattr__(self, "caption", _one_line(self.caption or "") or None)
        for field in self.known:
            self._check(field)

    @property
    def known(self) -> tuple[str, ...]:
        """Names of the YAML's fields that have a value, in order."""
        return tuple(field for field in FIELDS if getattr(self, field) is not None)

    def _check(self, field: str) -> None:
        value = getattr(self, field)
        if field in _RANGES:
            low, high = _RANGES[field]
            if not low <= value <= high:
                raise MetadataError(f"{field} = {value}: must be {low} to {high}")
        elif (read := _read(field, value)) != value:
            raise MetadataError(f"{field} = {value}: must be written {read}")


def written(metadata: Metadata) -> str:
    """The known fields as YAML, exactly as the model was trained on it; empty when nothing is known.

    Keys are sorted, numbers are bare, and what is longer than 80 columns goes on in lines indented by two spaces.
    """
    values = {field: getattr(metadata, field) for field in metadata.known}
    if metadata.timesignature is not None:
        values["timesignature"] = int(metadata.timesignature)
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=True).strip() if values else ""


def thought(metadata: Metadata) -> str:
    """The YAML between its tags; with nothing known, the empty thoughts of an unconditional prompt."""
    return "\n".join(line for line in (THINK, written(metadata), END_THINK) if line)


def parse(text: str) -> Metadata:
    """Read what the model wrote: its thoughts and, after them, lyrics if there are any.

    Tags may be missing, lines may be wrapped anywhere, and fields that are not the song's are passed over.

    Raises:
        MetadataError: there is no field at all, or one with a value that no song has.
    """
    thoughts, _, rest = text.partition(END_THINK)
    values = {field: _read(field, _unquoted(raw)) for field, raw in _fields(thoughts.rpartition(THINK)[2]).items()}
    if not values:
        raise MetadataError(f"there is no metadata in {text[:100]!r}")
    lyrics = _LYRIC_HEADING.sub("", rest, count=1).strip()
    return Metadata(**values, lyrics=lyrics or None)  # type: ignore[arg-type]  # each reader returns its field's type


def _one_line(text: str) -> str:
    return harmless(" ".join(_CONTROL.sub(" ", text).split()))


def _fields(thoughts: str) -> dict[str, str]:
    """Field by field, the text after the colon, with the lines that go on from it."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in thoughts.split("\n"):
        key, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            current = [value]
            found.setdefault(key.strip().lower(), current)
        else:
            current.append(line)
    return {field: raw for field in FIELDS if (raw := "\n".join(found.get(field, ())).strip())}


def _unquoted(raw: str) -> str:
    """YAML quotes a scalar that would mean something else without; the model may also have begun with a mere quote."""
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
