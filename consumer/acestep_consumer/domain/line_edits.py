# SPDX-License-Identifier: Apache-2.0
"""Lyrics with some lines replaced, and the part of the song in which these are sung. Pure."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from acestep_schemas.events import LyricLine

MARGIN_S: Final = 0.4
"""Seconds around the lines that are made anew with them: a singer breathes in before a line, and it fades after."""

SHORTEST_S: Final = 0.2
"""Least seconds of a stretch that is made anew. Lines in less are not sung: their times are where they were skipped."""

_SECTION: Final = frozenset({"section", "lyrics"})
_HEADER: Final = re.compile(r"\s*\[([^\]]*)\]\s*")
_NUMBERED: Final = re.compile(r"(.+?) (\d{1,3})")
_UNTIMED: Final = "the song has no times of its lines: make it with timestamps = true, then replace its lines"


@dataclass(frozen=True, slots=True)
class Rewritten:
    """New lyrics of the whole song, and the seconds of it that have to be sung anew."""

    lyrics: str
    start_s: float
    end_s: float
    because: str


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the lyrics; ``timed``: when it is sung, None for what is not."""

    text: str
    timed: LyricLine | None = None

    @property
    def header(self) -> str | None:
        """The name of the section that begins here."""
        found = _HEADER.fullmatch(self.text)
        return _plain(found[1]) if found else None


def rewritten(changes: Mapping[str, str], lyrics: str, timed: Sequence[LyricLine], song_s: float) -> Rewritten:
    """Return the lyrics with ``changes``: old lines to new ones, or ``section`` and its new ``lyrics``.

    Lines are compared without case, spaces and punctuation. What is sung between the first and the last of them is
    made anew, too.

    Raises:
        ValueError: the song has no times, there is no such line or section, it is not clear which one is meant, or it
            is not sung.
    """
    if not timed:
        raise ValueError(_UNTIMED)
    lines = _with_times(lyrics, timed)
    if changes.keys() == _SECTION:
        places = _section(lines, changes["section"])
        new = {places[0]: changes["lyrics"].strip("\n"), **dict.fromkeys(places[1:])}
    elif changes:
        new = {_place(lines, old): line for old, line in changes.items()}
    else:
        raise ValueError("has no line")
    written = [new.get(place, line.text) for place, line in enumerate(lines)]
    start, end = _window(lines, sorted(new), song_s)
    if end - start < SHORTEST_S:
        raise ValueError(
            f"{_because(lines, sorted(new))}, which is too short to be sung anew: the model seems to have left it out. "
            "Make another song with timestamps, or repaint a part by repainting_start and repainting_end"
        )
    return Rewritten(
        lyrics="\n".join(line for line in written if line is not None),
        start_s=start,
        end_s=end,
        because=_because(lines, sorted(new)),
    )


def _with_times(lyrics: str, timed: Sequence[LyricLine]) -> list[_Line]:
    """Give each line of the lyrics its time: the lines are sung in their order."""
    sung = iter([each for each in timed if _plain(each.text) and not _HEADER.fullmatch(each.text)])
    following = next(sung, None)
    lines = []
    for text in lyrics.split("\n"):
        line = _Line(text)
        if following is not None and line.header is None and _plain(text) == _plain(following.text):
            line, following = _Line(text, following), next(sung, None)
        lines.append(line)
    return lines


def _place(lines: Sequence[_Line], wanted: str) -> int:
    places = [
        place for place, line in enumerate(lines) if line.timed is not None and _plain(line.text) == _plain(wanted)
    ]
    if not places:
        known = ", ".join(repr(line.text.strip()) for line in lines if line.timed is not None)
        raise ValueError(f"the song does not sing {wanted!r}; it sings {known[:600]}")
    if len(places) > 1:
        times = ", ".join(f"{line.timed.start_s:.1f} s" for place in places if (line := lines[place]).timed is not None)
        raise ValueError(f"{wanted!r} is sung {len(places)} times, at {times}: name its section, with all its lyrics")
    return places[0]


def _section(lines: Sequence[_Line], wanted: str) -> list[int]:
    """Return the places of a section's lines, without its header. ``verse 2`` is also the second ``[verse]``."""
    headers = [(place, line.header) for place, line in enumerate(lines) if line.header is not None]
    name = _plain(wanted)
    starts = [place for place, header in headers if header == name]
    if not starts and (numbered := _NUMBERED.fullmatch(name)):
        same = [place for place, header in headers if header == numbered[1]]
        starts = same[int(numbered[2]) - 1 :][:1] if int(numbered[2]) else []
    if len(starts) != 1:
        known = ", ".join(repr(header) for _, header in headers) or "none"
        which = f"{len(starts)} sections {wanted!r}, number them" if starts else f"no section {wanted!r}"
        raise ValueError(f"the lyrics have {which}; their sections are {known[:600]}")
    end = next((place for place, _ in headers if place > starts[0]), len(lines))
    places = [place for place in range(starts[0] + 1, end) if lines[place].text.strip()]
    if not any(lines[place].timed for place in places):
        raise ValueError(f"nothing is sung in the section {wanted!r}")
    return places


def _window(lines: Sequence[_Line], places: Sequence[int], song_s: float) -> tuple[float, float]:
    """Return the seconds of the lines with a margin, which ends in the middle between them and their neighbours."""
    times = [line.timed for line in lines if line.timed is not None]
    changed = [timed for place in places if (timed := lines[place].timed) is not None]
    first, last = times.index(changed[0]), times.index(changed[-1])
    before = times[first - 1].end_s if first else 0.0
    after = times[last + 1].start_s if last + 1 < len(times) else song_s
    start, end = changed[0].start_s, changed[-1].end_s
    earliest = (before + start) / 2 if first else 0.0
    latest = (end + after) / 2 if last + 1 < len(times) else song_s
    return round(max(start - MARGIN_S, min(earliest, start)), 2), round(min(end + MARGIN_S, max(latest, end)), 2)


def _because(lines: Sequence[_Line], places: Sequence[int]) -> str:
    changed = [timed for place in places if (timed := lines[place].timed) is not None]
    sung = ", ".join(repr(timed.text.strip()) for timed in changed)
    return f"{sung[:300]}: sung from {changed[0].start_s:.2f} to {changed[-1].end_s:.2f} s"


def _plain(text: str) -> str:
    """Return words alone: without case, punctuation, and more than one space."""
    return " ".join(_words(unicodedata.normalize("NFKC", text).casefold()))


def _words(text: str) -> Iterator[str]:
    for word in text.split():
        if kept := "".join(each for each in word if each.isalnum() or unicodedata.category(each).startswith("M")):
            yield kept
