# SPDX-License-Identifier: Apache-2.0
"""Scores: what each measure costs, tables of one's own, and which songs are kept."""

import json
import re
from pathlib import Path

import pytest

from acestep_consumer.policy.scoring import (
    BUILT_IN,
    KNOWN,
    BestSongs,
    MeasureWeight,
    ScoreTable,
    ScoreTableError,
    load_score_table,
)

TABLE = ScoreTable(
    version="ours",
    measures={
        "silence": MeasureWeight(good=0.0, bad=0.5, weight=1.0),
        "lyrics": MeasureWeight(good=1.0, bad=0.0, weight=0.5),
    },
)


def test_a_score_is_the_product_of_what_the_measures_leave() -> None:
    assert TABLE.score({"silence": 0.1, "lyrics": 0.6}) == pytest.approx(0.8 * 0.8)


@pytest.mark.parametrize(("silence", "score"), [(-1, 1), (0, 1), (0.25, 0.5), (0.5, 0), (1, 0)])
def test_a_measure_costs_from_good_to_bad_and_no_more(silence: float, score: float) -> None:
    assert TABLE.score({"silence": silence}) == score


def test_a_measure_that_a_song_does_not_have_costs_nothing() -> None:
    assert TABLE.score({"silence": 0.0}) == TABLE.score({"silence": 0.0, "lyrics": 1.0}) == 1


def test_a_measure_that_the_table_does_not_have_costs_nothing() -> None:
    assert TABLE.score({"silence": 0.0, "noise": 0.0}) == 1


def test_the_best_are_kept_best_first_and_all_are_reported() -> None:
    best: BestSongs[str] = BestSongs(2, TABLE)
    for seed, silence in ((7, 0.3), (8, 0.0), (9, 0.1)):
        best.add(seed, f"song {seed}", {"silence": silence})
    assert best.best == ["song 8", "song 9"]
    assert [(each.seed, each.score, each.kept, each.index) for each in best.candidates] == [
        (7, 0.4, False, None),
        (8, 1.0, True, 0),
        (9, 0.8, True, 1),
    ]
    assert best.candidates[0].measures == {"silence": 0.3}


def test_of_equal_songs_the_first_is_kept() -> None:
    best: BestSongs[str] = BestSongs(1, TABLE)
    for name in "abc":
        best.add(1, name, {"silence": 0.2})
    assert best.best == ["a"]


def test_no_more_songs_are_held_than_are_kept() -> None:
    best: BestSongs[str] = BestSongs(2, TABLE)
    for seed in range(8):
        best.add(seed, "song", {"silence": seed / 20})
        assert len(best.best) <= 2


@pytest.mark.parametrize("order", [(None, 0.5), (0.5, None)])
def test_a_song_that_cannot_be_decoded_is_not_kept_beside_one_that_can(order: tuple[float | None, ...]) -> None:
    best: BestSongs[float | None] = BestSongs(2, TABLE)
    for silence in order:
        best.add(1, silence, None if silence is None else {"silence": silence})
    assert best.best == [0.5]
    assert [each.score for each in best.candidates] == [None if silence is None else 0.0 for silence in order]


def test_if_none_can_be_decoded_one_is_left_to_say_why() -> None:
    best: BestSongs[str] = BestSongs(2, TABLE)
    best.add(1, "a", None)
    best.add(2, "b", None)
    assert best.best == ["a"]


def test_a_table_of_ones_own_is_read(tmp_path: Path) -> None:
    file = tmp_path / "scores.toml"
    file.write_text('version = "quiet-1"\n[measures.silence]\ngood = 0.3\nbad = 0.9\nweight = 0.5\n')
    table = load_score_table(file)
    assert (table.version, table.score({"silence": 0.9, "noise": 0.0})) == ("quiet-1", 0.5)


def test_without_a_file_it_is_the_built_in_table() -> None:
    assert load_score_table(None) is BUILT_IN


def test_the_built_in_table_gives_a_song_without_a_fault_one() -> None:
    assert BUILT_IN.score({name: each.good for name, each in BUILT_IN.measures.items()}) == 1
    assert set(BUILT_IN.measures) == KNOWN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version = 1", "version: Input should be a valid string"),
        ('version = "a"\nmeasures = {}', "measures: Dictionary should have at least 1 item"),
        (
            'version = "a"\n[measures.loud]\ngood = 0\nbad = 1\nweight = 1',
            "there is no measure loud; known: abrupt_end, clipping, longest_gap, loudness_jumps, lyrics, noise",
        ),
        ('version = "a"\n[measures.noise]\ngood = 1\nbad = 1\nweight = 1', "good and bad must differ"),
        ('version = "a"\n[measures.noise]\ngood = 0\nbad = 1\nweight = 2', "less than or equal to 1"),
        ("version =", "is not TOML"),
    ],
)
def test_a_broken_table_is_refused_with_its_reason(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "scores.toml"
    file.write_text(text)
    with pytest.raises(ScoreTableError, match="ACESTEP_SCORE_TABLE") as caught:
        load_score_table(file)
    assert said in str(caught.value)


def test_a_table_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScoreTableError, match=r"nowhere\.toml cannot be read: No such file"):
        load_score_table(tmp_path / "nowhere.toml")


DOCUMENT = (Path(__file__).parents[3] / "infra/docs/candidates.md").read_text(encoding="utf-8")


def test_the_document_has_the_table() -> None:
    rows = [line.split("|")[1:6] for line in DOCUMENT.splitlines() if line.startswith("| `")]
    table = {
        name.strip(" `"): tuple(map(float, numbers))
        for name, _unit, *numbers in rows
        if name.strip(" `") in BUILT_IN.measures
    }
    assert table == {name: (each.good, each.bad, each.weight) for name, each in BUILT_IN.measures.items()}


def test_the_document_s_example_adds_up() -> None:
    (example,) = re.findall(r"```json\n(\{\n.*?)```", DOCUMENT, re.DOTALL)
    found = json.loads(example)
    best: BestSongs[int] = BestSongs(1, BUILT_IN)
    for each in found["candidates"]:
        best.add(each["seed"], each["seed"], each["measures"])
    assert [each.model_dump() for each in best.candidates] == found["candidates"]
    assert (found["score_table"], best.best) == (BUILT_IN.version, [found["audios"][0]["seed"]])


def test_the_document_s_own_table_is_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    (tmp_path / "scores.toml").write_text(example)
    assert set(load_score_table(tmp_path / "scores.toml").measures) == {"lyrics", "silence"}
