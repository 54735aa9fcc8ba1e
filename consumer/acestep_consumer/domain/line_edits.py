# SPDX-License-Identifier: Apache-2.0
"""Lyrics with some lines replaced, and the part of the song in which these are sung. Pure."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from acestep_schemas.events import Audio, LyricLine

MARGIN_S: Final = 0.4
"""Seconds around the lines that are made anew with them: a singer breathes in before a line, and it fades after."""

SHORTEST_S: Final = 0.2
"""Least seconds of a stretch that is made anew. Lines in less are not sung: their times are where they were skipped."""

_SKIPPED: Final = 0.25
"""Share of the song's average seconds a line below which a line counts as having no time of its own.

Alignment gives a line that is left out some frames at most, and those beside it their usual time.
"""
_ROOM: Final = 0.75
"""Share of the average seconds a line that may be enough to sing one more line in."""
_LONG: Final = 2.0
"""Times the average seconds a line from which on a line has more in it than itself: a break, the end, other lines."""

_SECTION: Final = frozenset({"section", "lyrics"})
_HEADER: Final = re.compile(r"\s*\[([^\]]*)\]\s*")
_NUMBERED: Final = re.compile(r"(.+?) (\d{1,3})")
_UNTIMED: Final = "the song has no times of its lines: make it with timestamps = true, then replace its lines"
_BY_HAND: Final = "repaint a part by repainting_start and repainting_end"


@dataclass(frozen=True, slots=True)
class Rewritten:
    """New lyrics of the whole song, and the seconds of it that have to be sung anew.

    ``warnings``: what is made anew with the lines that are replaced.
    """

    lyrics: str
    start_s: float
    end_s: float
    because: str
    warnings: tuple[str, ...] = ()


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


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Lines ``first`` to ``last`` of all that are sung, of which those ``changed`` are replaced."""

    sung: Sequence[LyricLine]
    changed: Sequence[int]
    song_s: float

    @property
    def first(self) -> int:
        return self.changed[0]

    @property
    def last(self) -> int:
        return self.changed[-1]

    @property
    def start_s(self) -> float:
        return self.sung[self.first].start_s

    @property
    def end_s(self) -> float:
        return self.sung[self.last].end_s

    @property
    def because(self) -> str:
        """The lines in a sentence."""
        names = ", ".join(repr(self.sung[each].text.strip()) for each in self.changed)
        return f"{names[:300]}: sung from {self.start_s:.2f} to {self.end_s:.2f} s"

    @property
    def line_s(self) -> float:
        """Average seconds a line of the song, with its breaks."""
        return self.song_s / len(self.sung)

    @property
    def lines(self) -> float:
        """Length of the stretch, in average lines."""
        return (self.end_s - self.start_s) / self.line_s

    def window(self) -> tuple[float, float]:
        """Return its seconds with a margin, which ends in the middle between it and its neighbours."""
        start, end, is_last = self.start_s, self.end_s, self.last + 1 == len(self.sung)
        earliest = (self.sung[self.first - 1].end_s + start) / 2 if self.first else 0.0
        latest = self.song_s if is_last else (end + self.sung[self.last + 1].start_s) / 2
        return round(max(start - MARGIN_S, min(earliest, start)), 2), round(min(end + MARGIN_S, max(latest, end)), 2)

    def beside(self) -> list[str]:
        """Return the lines before and after it that have no time of their own, up to the next ones that have."""
        before, after = reversed(self.sung[: self.first]), self.sung[self.last + 1 :]
        skipped = [list(takewhile(self._is_skipped, side)) for side in (before, after)]
        return [line.text.strip() for line in (*reversed(skipped[0]), *skipped[1])]

    def _is_skipped(self, line: LyricLine) -> bool:
        return line.end_s - line.start_s < _SKIPPED * self.line_s

    def check(self) -> None:
        """Refuse a stretch in which its lines are not sung, or in which others may be. Raises ``ValueError``."""
        start, end = self.window()
        if end - start < SHORTEST_S:
            raise ValueError(
                f"{self.because}, which is too short to be sung anew: the model seems to have left it out. "
                f"Make another song with timestamps, or {_BY_HAND}"
            )
        beside = self.beside()
        if beside and self.lines >= _ROOM * (self.last - self.first + 1 + len(beside)):
            names = ", ".join(map(repr, beside))[:300]
            raise ValueError(
                f"{self.because}, which is long enough to have the lines beside it in it, too, for which no other time "
                f"was found: {names}. They would be made anew with it. If they may be, name them, too, line by line, "
                f"each with its own words; otherwise {_BY_HAND}, or make another song with timestamps"
            )

    def warnings(self, score: float | None) -> Iterator[str]:
        """Yield what is made anew with the lines that are replaced; ``score``: the song's ``lyric_score``."""
        count = self.last - self.first + 1
        if between := count - len(self.changed):
            yield (
                f"replace_lines: {between} more lines between those that are replaced are made anew, too: to keep "
                "them, replace one line, then the other in the song that this makes"
            )
        if self.lines > _LONG * count:
            known = "" if score is None else f" (its lyric_score is {score:g})"
            yield (
                f"replace_lines: {self.because}, {self.lines / count:.1f} times as long as a line of this song is on "
                f"average{known}. A part without singing is made anew with it, and so is what else is sung there if "
                f"that time is wrong: to keep more of the song, {_BY_HAND}"
            )


def rewritten(changes: Mapping[str, str], lyrics: str, audio: Audio) -> Rewritten:
    """Return the lyrics with ``changes``: old lines to new ones, or ``section`` and its new ``lyrics``.

    Lines are compared without case, spaces and punctuation. What is sung between the first and the last of them is
    made anew, too.

    Raises:
        ValueError: the song has no times, there is no such line or section, it is not clear which one is meant, it
            is not sung, is named twice, or other lines may be sung in its time.
    """
    if not audio.lyrics:
        raise ValueError(_UNTIMED)
    lines = _with_times(lyrics, audio.lyrics)
    if changes.keys() == _SECTION:
        places = _section(lines, changes["section"])
        new = {places[0]: changes["lyrics"].strip("\n"), **dict.fromkeys(places[1:])}
    elif changes:
        new = _new_lines(lines, changes)
    else:
        raise ValueError("has no line")
    written = [new.get(place, line.text) for place, line in enumerate(lines)]
    sung = [(place, line.timed) for place, line in enumerate(lines) if line.timed is not None]
    changed = [number for number, (place, _) in enumerate(sung) if place in new]
    stretch = _Stretch([timed for _, timed in sung], changed, audio.duration_s)
    stretch.check()
    start, end = stretch.window()
    return Rewritten(
        lyrics="\n".join(line for line in written if line is not None),
        start_s=start,
        end_s=end,
        because=stretch.because,
        warnings=tuple(stretch.warnings(audio.lyric_score)),
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


def _new_lines(lines: Sequence[_Line], changes: Mapping[str, str]) -> dict[int, str | None]:
    new: dict[int, str | None] = {}
    for old, line in changes.items():
        place = _place(lines, old)
        if place in new:
            raise ValueError(f"names {lines[place].text.strip()!r} twice: case and punctuation do not count")
        new[place] = line
    return new


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


def _plain(text: str) -> str:
    """Return words alone: without case, punctuation, and more than one space."""
    return " ".join(_words(unicodedata.normalize("NFKC", text).casefold()))


def _words(text: str) -> Iterator[str]:
    for word in text.split():
        if kept := "".join(each for each in word if each.isalnum() or unicodedata.category(each).startswith("M")):
            yield kept
