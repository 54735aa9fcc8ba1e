# SPDX-License-Identifier: Apache-2.0
"""Fades of an earlier song of which a part is made anew. Pure.

What is kept of the song fades already, since its file does. So a fade belongs to the new song only where the new part
has all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from acestep_schemas.request import GenerationRequest

_SAME = 1e-6  # seconds


@dataclass(frozen=True, slots=True)
class SongFades:
    """The seconds of a song, and those at its ends in which it fades."""

    song_s: float
    in_s: float
    out_s: float

    @classmethod
    def of(cls, made_by: GenerationRequest, song_s: float) -> "SongFades":
        """Return the fades that the song's request asked for."""
        return cls(song_s, min(made_by.fade_in_duration, song_s), min(made_by.fade_out_duration, song_s))

    def made_anew(self, start: float, end: float | None) -> Iterator[tuple[str, float]]:
        """Yield the fades that are in the part from ``start`` to ``end`` as a whole: field and seconds."""
        for name, seconds, covered in self._covered(start, end):
            if covered >= seconds - _SAME:
                yield name, seconds

    def cut(self, start: float, end: float | None) -> Iterator[tuple[str, str]]:
        """Yield the fades of which a piece is in that part: field and warning."""
        for name, seconds, covered in self._covered(start, end):
            if _SAME < covered < seconds - _SAME:
                place = "first" if name == "fade_in_duration" else "last"
                fades = f"the song fades in its {place} {seconds:g} s, of which {covered:g} s are made anew"
                yield name, f"{fades}: these do not fade. Make all of them anew to keep the fade"

    def _covered(self, start: float, end: float | None) -> Iterator[tuple[str, float, float]]:
        """Yield each fade of the song: its field, its seconds, and how many of them are made anew."""
        if end is None or end <= start:
            start, end = (start, self.song_s) if end is None else (0.0, self.song_s)
        if self.in_s:
            yield "fade_in_duration", self.in_s, max(0.0, min(end, self.in_s) - max(start, 0.0))
        if self.out_s:
            first = self.song_s - self.out_s
            yield "fade_out_duration", self.out_s, max(0.0, min(end, self.song_s) - max(start, first))
