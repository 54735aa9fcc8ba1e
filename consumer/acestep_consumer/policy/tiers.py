# SPDX-License-Identifier: Apache-2.0
"""The tier table: limits on duration and batch size by GPU memory.

The built-in rows are the limits of ACE-Step 1.5's own server as of February 2026; those of June ship beside them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, field_validator

from acestep_consumer.policy.toml_tables import read_table
from acestep_schemas.request import FieldProblem, GenerationRequest

MIN_DURATION_S, MAX_DURATION_S = 10, 600
DEFAULT_DURATION_S = 120.0
"""Length of a song when neither the request nor source audio, audio codes or the LM determine it, as in ACE-Step."""
MIN_BPM, MAX_BPM = 30, 300
MAX_BATCH = 8
OFFLOAD_BELOW_GB = 15.5
# MPS shares its memory with the CPU: moving weights between the two frees nothing.
OFFLOADABLE = ("cuda", "xpu")

LMS = ("acestep-5Hz-lm-0.6B", "acestep-5Hz-lm-1.7B", "acestep-5Hz-lm-4B")
LM_MEMORY_GB = dict(zip(LMS, (3.0, 8.0, 12.0), strict=True))


_WIDEST: Final = (("audio_duration", 0, MAX_DURATION_S), ("batch_size", 1, MAX_BATCH), ("candidates", 1, MAX_BATCH))


def offloads(kind: str, vram_gb: float, asked: bool | None) -> bool:  # noqa: FBT001 - the setting's value
    """Whether models are kept in RAM between uses: as set, or by default on GPUs below 15.5 GB."""
    return kind in OFFLOADABLE and (vram_gb < OFFLOAD_BELOW_GB if asked is None else asked)


class TierTableError(Exception):
    """A tier table file is invalid; the message names the file and the rule."""


class Tier(BaseModel):
    """One row: the limits for GPUs of up to ``max_vram_gb`` GB, or below it if ``exclusive``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    max_vram_gb: float = Field(default=float("inf"), gt=0)
    exclusive: bool = False
    max_seconds_with_lm: int = Field(ge=MIN_DURATION_S, le=MAX_DURATION_S)
    max_seconds: int = Field(ge=MIN_DURATION_S, le=MAX_DURATION_S)
    max_batch_with_lm: int = Field(ge=1, le=MAX_BATCH)
    max_batch: int = Field(ge=1, le=MAX_BATCH)
    lm_by_default: bool = False
    lms: tuple[str, ...] = ()

    def holds(self, vram_gb: float) -> bool:
        """Whether a GPU with this memory belongs to this tier or a smaller one."""
        return vram_gb < self.max_vram_gb if self.exclusive else vram_gb <= self.max_vram_gb


def beyond_every_tier(request: GenerationRequest) -> Iterator[FieldProblem]:
    """Yield the fields that no tier allows: a table of one's own cannot allow more than the largest one here."""
    for name, least, most in _WIDEST:
        # It says the same as candidates.
        value = None if name == "batch_size" and request.candidates else getattr(request, name)
        if value is not None and not least <= value <= most:
            yield FieldProblem(field=name, value=f"{value:g}", rule=f"must be {least} to {most}")


class TierTable(BaseModel):
    """Rows from the smallest GPU to the largest; the last one has no upper bound."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(min_length=1)
    tiers: tuple[Tier, ...] = Field(min_length=1)

    @field_validator("tiers")
    @classmethod
    def _ascending_and_open(cls, tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
        sizes = [tier.max_vram_gb for tier in tiers]
        if sizes != sorted(set(sizes)) or sizes[-1] != float("inf"):
            raise ValueError("max_vram_gb must increase from row to row, and the last row must not set it")
        return tiers

    def in_words(self, vram_gb: float) -> str:
        """Return what a GPU with ``vram_gb`` GB may do by this table."""
        tier = self.tier_of(vram_gb)
        return (
            f"{tier.name} of {self.version}: songs of at most {tier.max_seconds_with_lm} s with the LM and "
            f"{tier.max_seconds} s without; batches of at most {tier.max_batch_with_lm} and {tier.max_batch}"
        )

    def tier_of(self, vram_gb: float) -> Tier:
        """Return the tier of a GPU with ``vram_gb`` GB; without a GPU (0) it is the first row."""
        return next(tier for tier in self.tiers if tier.holds(vram_gb))


# seconds and batch: with LM / without
_ROWS_2026_02 = """\
name       vram  seconds  batch  lm   lms
tier1      4     180/180  1/1    no   0
tier2      6     360/360  1/1    no   0
tier3      8     240/360  1/2    no   1
tier4      12    240/360  2/4    no   1
tier5      <15.5 240/360  2/4    yes  2
tier6      24    480/480  4/8    yes  3
unlimited  inf   600/600  8/8    yes  3
"""
_ROWS_2026_06 = """\
name       vram  seconds  batch  lm   lms
tier1      4     240/360  1/1    no   0
tier2      6     480/600  1/1    no   0
tier3      8     480/600  2/2    yes  1
tier4      12    480/600  2/4    yes  1
tier5      <15.5 480/600  4/4    yes  2
tier6a     <20   480/600  4/8    yes  2
tier6b     24    480/480  8/8    yes  3
unlimited  inf   600/600  8/8    yes  3
"""


def _row(line: str) -> Tier:
    name, vram, seconds, batch, by_default, lms = line.split()
    with_lm_s, without_s = map(int, seconds.split("/"))
    with_lm_songs, without_songs = map(int, batch.split("/"))
    return Tier(
        name=name,
        max_vram_gb=float(vram.removeprefix("<")),
        exclusive=vram.startswith("<"),
        max_seconds_with_lm=with_lm_s,
        max_seconds=without_s,
        max_batch_with_lm=with_lm_songs,
        max_batch=without_songs,
        lm_by_default=by_default == "yes",
        lms=LMS[: int(lms)],
    )


def _table(version: str, rows: str) -> TierTable:
    return TierTable(version=version, tiers=tuple(map(_row, rows.splitlines()[1:])))


BUILT_IN = _table("acestep-1.5-2026-02", _ROWS_2026_02)
NEWER = _table("acestep-1.5-2026-06", _ROWS_2026_06)
"""The limits of ACE-Step's server as of June 2026; below 20 GB they count on weights in int8."""

SHIPPED = {table.version: table for table in (BUILT_IN, NEWER)}
"""Tables that ``ACESTEP_TIER_TABLE`` may name in place of a file."""


def load_table(path: Path | None) -> TierTable:
    """Return the built-in table, a shipped one by its version, or one from a TOML file (``version`` and ``[[tiers]]``).

    Raises:
        TierTableError: the file cannot be read or is invalid.
    """
    if path is None:
        return BUILT_IN
    if str(path) in SHIPPED:
        return SHIPPED[str(path)]
    hint = f"; tables without a file: {', '.join(SHIPPED)}"
    return read_table(path, TierTable, "ACESTEP_TIER_TABLE", TierTableError, hint)


def others(table: TierTable) -> tuple[TierTable, ...]:
    """Return the shipped tables that are not in force."""
    return tuple(other for version, other in SHIPPED.items() if version != table.version)
