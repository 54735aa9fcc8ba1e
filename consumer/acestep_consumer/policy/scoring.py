# SPDX-License-Identifier: Apache-2.0
"""Scores of candidates: the score table, which weighs a song's measures, and the choice of the best. Pure.

A score is the product of one factor a measure. A measure at ``good`` has the factor 1, one at ``bad`` or beyond has
1 - ``weight``, and between them it falls evenly. A measure that a song does not have, such as ``lyrics`` of an
instrumental one, counts as good.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from acestep_consumer.policy.toml_tables import read_table
from acestep_schemas.events import Candidate


class ScoreTableError(Exception):
    """A score table file is invalid; the message names the file and the rule."""


class MeasureWeight(BaseModel):
    """Cost of one measure: ``good`` and ``bad`` are in its unit, ``weight`` is the share that a bad one takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    good: float
    bad: float
    weight: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.good == self.bad:
            raise ValueError("good and bad must differ")
        return self

    def factor(self, value: float) -> float:
        """Return the factor of a value, 1 - ``weight`` to 1."""
        badness = (value - self.good) / (self.bad - self.good)
        return 1 - self.weight * min(max(badness, 0.0), 1.0)


class ScoreTable(BaseModel):
    """Weights of the measures, by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(min_length=1, max_length=64)
    measures: dict[str, MeasureWeight] = Field(min_length=1)

    def score(self, measures: Mapping[str, float]) -> float:
        """Return the score of a song, 0 (worst) to 1, rounded to 4 places."""
        return round(prod(each.factor(measures[name]) for name, each in self.measures.items() if name in measures), 4)


BUILT_IN = ScoreTable(
    version="acestep-consumer-1",
    measures={
        "lyrics": MeasureWeight(good=0.6, bad=0.0, weight=0.7),
        "silence": MeasureWeight(good=0.02, bad=0.4, weight=1.0),
        "longest_gap": MeasureWeight(good=1.0, bad=10.0, weight=0.5),
        "clipping": MeasureWeight(good=0.0, bad=0.01, weight=0.6),
        "loudness_jumps": MeasureWeight(good=2.5, bad=12.0, weight=0.5),
        "noise": MeasureWeight(good=-40.0, bad=-15.0, weight=0.8),
        "abrupt_end": MeasureWeight(good=-20.0, bad=-3.0, weight=0.1),
    },
)
KNOWN = frozenset(BUILT_IN.measures)
"""The measures that there are."""


Song = TypeVar("Song")


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Song]):
    """``place``: among the songs that were added. ``rank``: its score, or -1 of a song that could not be decoded."""

    place: int
    rank: float
    song: Song


class BestSongs(Generic[Song]):
    """Keeps the best ``keep`` of the songs that are added, and lets go of the others at once.

    Of equal songs the first is the better one. A song that could not be decoded is kept only where no other could be.
    """

    def __init__(self, keep: int, table: ScoreTable) -> None:
        self._keep = keep
        self._table = table
        self._best: list[_Entry[Song]] = []
        self._added: list[Candidate] = []

    def add(self, seed: int, song: Song, measures: Mapping[str, float] | None) -> None:
        """Add a song; ``measures`` None: it could not be decoded."""
        score = None if measures is None else self._table.score(measures)
        rounded = {name: round(value, 5) for name, value in (measures or {}).items()}
        entries = [*self._best, _Entry(len(self._added), -1.0 if score is None else score, song)]
        entries.sort(key=lambda each: -each.rank)  # stable
        decoded = [each for each in entries if each.rank >= 0]
        self._best = (decoded or entries)[: self._keep if decoded else 1]
        self._added.append(Candidate(seed=seed, score=score, kept=False, measures=rounded))

    @property
    def best(self) -> list[Song]:
        """The songs that are kept, best first."""
        return [each.song for each in self._best]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All songs, as they were added."""
        kept = {each.place: index for index, each in enumerate(self._best)}
        return tuple(
            each.model_copy(update={"kept": place in kept, "index": kept.get(place)})
            for place, each in enumerate(self._added)
        )


def load_score_table(path: Path | None) -> ScoreTable:
    """Return the built-in table, or one from a TOML file (``version`` and ``[measures.NAME]``).

    Raises:
        ScoreTableError: the file cannot be read or is invalid.
    """
    if path is None:
        return BUILT_IN
    table = read_table(path, ScoreTable, "ACESTEP_SCORE_TABLE", ScoreTableError)
    if unknown := sorted(table.measures.keys() - KNOWN):
        known = ", ".join(sorted(KNOWN))
        raise ScoreTableError(f"ACESTEP_SCORE_TABLE: {path}: there is no measure {', '.join(unknown)}; known: {known}")
    return table
