# SPDX-License-Identifier: Apache-2.0
"""The tier table: its numbers, its edges, and files in its place."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.policy.tiers import BUILT_IN, LM_MEMORY_GB, NEWER, TierTable, TierTableError, load_table, others


@pytest.mark.parametrize(
    ("vram_gb", "name"),
    [
        (0, "tier1"),
        (4, "tier1"),
        (4.01, "tier2"),
        (6, "tier2"),
        (8, "tier3"),
        (12, "tier4"),
        (15.49, "tier5"),
        (15.5, "tier6"),
        (24, "tier6"),
        (24.01, "unlimited"),
        (139.8, "unlimited"),
    ],
)
def test_a_card_falls_into_the_tier_of_its_memory(vram_gb: float, name: str) -> None:
    assert BUILT_IN.tier_of(vram_gb).name == name


def limits_of(table: TierTable) -> dict[str, tuple[tuple[float, float], tuple[int, int], bool, int]]:
    """Seconds and songs with and without the language model, whether it is loaded, and of how many, for each tier."""
    return {
        tier.name: (
            (tier.max_seconds_with_lm, tier.max_seconds),
            (tier.max_batch_with_lm, tier.max_batch),
            tier.lm_by_default,
            len(tier.lms),
        )
        for tier in table.tiers
    }


def test_the_built_in_limits_are_those_of_the_server_that_operators_know() -> None:
    assert limits_of(BUILT_IN) == {
        "tier1": ((180, 180), (1, 1), False, 0),
        "tier2": ((360, 360), (1, 1), False, 0),
        "tier3": ((240, 360), (1, 2), False, 1),
        "tier4": ((240, 360), (2, 4), False, 1),
        "tier5": ((240, 360), (2, 4), True, 2),
        "tier6": ((480, 480), (4, 8), True, 3),
        "unlimited": ((600, 600), (8, 8), True, 3),
    }


def test_every_listed_language_model_has_a_known_size() -> None:
    assert {name for tier in BUILT_IN.tiers for name in tier.lms} == set(LM_MEMORY_GB)


@given(st.floats(min_value=0, max_value=1e6))
def test_every_card_has_exactly_one_tier(vram_gb: float) -> None:
    holding = [tier for tier in BUILT_IN.tiers if tier.holds(vram_gb)]
    assert BUILT_IN.tier_of(vram_gb) == holding[0]


TABLE = """
version = "ours-1"
[[tiers]]
name = "small"
max_vram_gb = 24
max_seconds_with_lm = 120
max_seconds = 240
max_batch_with_lm = 1
max_batch = 2
[[tiers]]
name = "large"
max_seconds_with_lm = 600
max_seconds = 600
max_batch_with_lm = 8
max_batch = 8
"""


def test_a_toml_file_replaces_the_table(tmp_path: Path) -> None:
    path = tmp_path / "tiers.toml"
    path.write_text(TABLE)
    table = load_table(path)
    assert (table.version, table.tier_of(24).name, table.tier_of(25).name) == ("ours-1", "small", "large")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version = ", "is not TOML"),
        ("version = 'x'\ntiers = []", "tiers"),
        (TABLE.replace("max_vram_gb = 24", ""), "the last row must not set it"),
        (TABLE.replace("max_seconds = 240", "max_seconds = 6000"), "max_seconds"),
        (TABLE.replace("max_batch = 2", "max_bach = 2"), "max_bach"),
    ],
)
def test_a_broken_table_file_says_what_is_wrong_with_it(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "tiers.toml"
    path.write_text(text)
    with pytest.raises(TierTableError, match=says) as caught:
        load_table(path)
    assert "ACESTEP_TIER_TABLE" in str(caught.value)


def test_a_missing_table_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TierTableError, match="cannot be read"):
        load_table(tmp_path / "none.toml")


def test_the_newer_table_ships_beside_and_is_named_by_its_version() -> None:
    newer = load_table(Path("acestep-1.5-2026-06"))
    assert newer is NEWER
    assert others(newer) == (BUILT_IN,)
    assert limits_of(newer) == {
        "tier1": ((240, 360), (1, 1), False, 0),
        "tier2": ((480, 600), (1, 1), False, 0),
        "tier3": ((480, 600), (2, 2), True, 1),
        "tier4": ((480, 600), (2, 4), True, 1),
        "tier5": ((480, 600), (4, 4), True, 2),
        "tier6a": ((480, 600), (4, 8), True, 2),
        "tier6b": ((480, 480), (8, 8), True, 3),
        "unlimited": ((600, 600), (8, 8), True, 3),
    }
    sizes = [(15.49, "tier5"), (15.5, "tier6a"), (19.99, "tier6a"), (20, "tier6b"), (24, "tier6b"), (25, "unlimited")]
    assert [newer.tier_of(vram_gb).name for vram_gb, _ in sizes] == [name for _, name in sizes]
