# SPDX-License-Identifier: Apache-2.0
"""Agreement of candidates' scores with planted faults, and what measuring costs.

Songs are synthesised, and parts of recordings where files are given. Each fault is planted into each song, in three
grades (``tests/support/planted_faults.py`` says what they are). Two areas under the ROC curve are printed for each:

- `any`: how often a song without the fault has a better score than any of the songs with it, whatever they are;
- `same`: how often it has a better score than itself with the fault, which is what candidates of one request are like.

Wrong lyrics are planted into made-up attention. `with lyrics` gives each song an attention too, so that the score of
one without a fault varies as those of real songs do. The last lines are processor time for 300 seconds of sound.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from acestep_consumer.audio.measures import measures_of
from acestep_consumer.policy.scoring import BUILT_IN
from tests.support.planted_faults import (
    FAULTS,
    GRADES,
    RATE,
    Song,
    area_under_curve,
    arranged_music,
    recordings,
    score_of_attention,
    sung_attention,
)

SONG_S = 30
LONG_S = 300
_FADE_S = 2
_FIRST_SEED = 5_000  # others than those that the table was made with

Measures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Areas under the ROC curve of one fault in one grade, over so many songs."""

    fault: str
    grade: str
    songs: int
    any: float
    same: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", nargs="*", type=Path, help="audio files with music, such as MP3")
    parser.add_argument("--songs", type=int, default=20, help="synthesised songs; half as many parts of each recording")
    parser.add_argument("--json", action="store_true", help="print one object of JSON")
    options = parser.parse_args()
    songs = [arranged_music(SONG_S, _FIRST_SEED + number) for number in range(options.songs)]
    parts = [_faded(part) for part in recordings(options.recordings, SONG_S, options.songs // 2)]
    found = {"synthesised": list(_agreements(songs)), "with lyrics": list(_agreements(songs, sung=True))}
    if parts:
        found["recordings"] = list(_agreements(parts))
        found["all sound"] = list(_agreements([*songs, *parts]))
    seconds = dict(_costs())
    if options.json:
        rows = {name: list(map(asdict, each)) for name, each in found.items()}
        print(json.dumps({"table": BUILT_IN.version, "agreement": rows, "core_s": seconds}))  # noqa: T201 - its output
    else:
        print("\n".join(_lines(found, seconds)))  # noqa: T201 - as above


def _lines(found: Mapping[str, list[Agreement]], seconds: Mapping[str, float]) -> Iterator[str]:
    for name, rows in found.items():
        yield f"{name:14} {'fault':16} {'grade':8} songs    any   same"
        for row in rows:
            yield f"{'':14} {row.fault:16} {row.grade:8} {row.songs:5} {row.any:6.3f} {row.same:6.3f}"
        yield ""
    for sound, cost in seconds.items():
        yield f"measuring {LONG_S} s of {sound}: {cost * 1000:.0f} ms"


def _agreements(songs: list[Song], *, sung: bool = False) -> Iterator[Agreement]:
    """Yield the agreement on each fault and grade, and on all of them together."""
    plain = [_measured(song) | _lyrics(number, None, sung=sung) for number, song in enumerate(songs)]
    good = _scores(plain)
    heard: list[float] = []
    mild: list[float] = []
    for fault, plant in FAULTS.items():
        for grade, name in enumerate(GRADES):
            rngs = [np.random.default_rng((number, grade)) for number in range(len(songs))]
            broken = [_measured(plant(song, grade, rng)) for song, rng in zip(songs, rngs, strict=True)]
            bad = _scores([{**before, **after} for before, after in zip(plain, broken, strict=True)])
            (heard if grade else mild).extend(bad)
            yield _agreement(fault, name, good, bad)
    for grade, name in enumerate(GRADES) if sung else ():
        bad = _scores([{**each, **_lyrics(number, grade)} for number, each in enumerate(plain)])
        (heard if grade else mild).extend(bad)
        yield _agreement("wrong lyrics", name, good, bad)
    for name, bad in (("heard", heard), ("all", heard + mild)):
        yield _agreement("all", name, good * (len(bad) // len(good)), bad)


def _agreement(fault: str, grade: str, good: list[float], bad: list[float]) -> Agreement:
    same = np.mean([(before > after) + 0.5 * (before == after) for before, after in zip(good, bad, strict=True)])
    return Agreement(fault, grade, len(bad), round(area_under_curve(good, bad), 3), round(float(same), 3))


def _measured(song: Song) -> dict[str, float]:
    found = measures_of(song, RATE)
    if found is None:
        raise ValueError("the song has samples that are not numbers")
    return found


def _lyrics(number: int, grade: int | None, *, sung: bool = True) -> dict[str, float]:
    """Return the measure of made-up lyrics, the same for a song in every grade but for the fault."""
    if not sung:
        return {}
    return {"lyrics": score_of_attention(sung_attention(np.random.default_rng(_FIRST_SEED + number), grade))}


def _scores(songs: Sequence[Measures]) -> list[float]:
    return [BUILT_IN.score(measures) for measures in songs]


def _faded(song: Song) -> Song:
    """Return a part of a recording with a fade-out: cut out of the middle of it, it would end too suddenly."""
    song = song.copy()
    song[:, -_FADE_S * RATE :] *= np.linspace(1, 0, _FADE_S * RATE, dtype=np.float32)
    return song


def _costs() -> Iterator[tuple[str, float]]:
    """Yield the least of three times for music, for the same clipped, and for noise."""
    music = np.tile(arranged_music(SONG_S, 1), LONG_S // SONG_S)
    noise = np.random.default_rng(0).normal(0, 0.1, music.shape).astype(np.float32)
    for name, song in (("music", music), ("clipped music", np.clip(music * 8, -1, 1)), ("noise", noise)):
        yield name, min(_seconds(song) for _ in range(3))


def _seconds(song: Song) -> float:
    begun = time.process_time()
    measures_of(song, RATE)
    return time.process_time() - begun


if __name__ == "__main__":
    main()
