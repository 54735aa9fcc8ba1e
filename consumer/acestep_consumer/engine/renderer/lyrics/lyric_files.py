# SPDX-License-Identifier: Apache-2.0
"""Lyrics with times as files: LRC, which players show line by line, and WebVTT, for browsers and videos."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from acestep_consumer.domain.job import LYRIC_TYPES, SIDE_FILE_SUFFIXES, SideFile, SideFileKind
from acestep_schemas.events import LyricLine

_SHORTEST_CUE_S: Final = 0.08
"""WebVTT has no cue without a length."""


def write_lyrics(lines: Iterable[LyricLine], stem: Path) -> tuple[SideFile, ...]:
    """Write ``<stem>.lrc`` and ``<stem>.vtt``."""
    kept = tuple(lines)
    texts: dict[SideFileKind, str] = {"lrc": lrc(kept), "vtt": vtt(kept)}
    files = []
    for kind, text in texts.items():
        path = stem.with_name(stem.name + SIDE_FILE_SUFFIXES[kind])
        path.write_text(text + "\n", encoding="utf-8")
        files.append(SideFile(kind=kind, path=path, content_type=LYRIC_TYPES[kind]))
    return tuple(files)


def lrc(lines: Iterable[LyricLine]) -> str:
    """Return LRC, ``[mm:ss.xx]text`` a line, as ACE-Step writes it: section tags are lines too."""
    return "\n".join(f"[{_clock(line.start_s)}]{line.text}" for line in lines)


def vtt(lines: Iterable[LyricLine]) -> str:
    """Return WebVTT with a cue for each sung line, and in it the time of each token; section tags are left out."""
    cues = [_cue(line) for line in lines if not _is_tag(line.text)]
    return "\n\n".join(["WEBVTT", *cues])


def _cue(line: LyricLine) -> str:
    end_s = max(line.end_s, line.start_s + _SHORTEST_CUE_S)
    return f"{_long_clock(line.start_s)} --> {_long_clock(end_s)}\n{''.join(_timed(line, end_s)).strip()}"


def _timed(line: LyricLine, end_s: float) -> Iterator[str]:
    """Yield a line's text with the times inside the cue that are later than the one before, as WebVTT wants them."""
    reached = line.start_s
    for token in line.tokens:
        if reached < token.start_s < end_s:
            reached = token.start_s
            yield f"<{_long_clock(reached)}>"
        yield token.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _is_tag(text: str) -> bool:
    return text.startswith("[") and text.endswith("]")


def _clock(seconds: float) -> str:
    minutes, hundredths = divmod(round(seconds * 100), 6_000)
    return f"{minutes:02d}:{hundredths // 100:02d}.{hundredths % 100:02d}"


def _long_clock(seconds: float) -> str:
    whole, thousandths = divmod(round(seconds * 1_000), 1_000)
    return f"{whole // 3_600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{thousandths:03d}"
