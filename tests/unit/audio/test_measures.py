# SPDX-License-Identifier: Apache-2.0
"""Measures of a song: what each one says of sound whose faults are known."""

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from acestep_consumer.audio.measures import measures_of
from acestep_consumer.policy.scoring import BUILT_IN
from tests.support.planted_faults import (
    FAULTS,
    GRADES,
    RATE,
    area_under_curve,
    arranged_music,
    score_of_attention,
    sung_attention,
)

SECONDS = 20
TIMES = np.arange(SECONDS * RATE) / RATE
LEAST_AREA = 0.9
SONGS, SONG_S = 6, 15

Samples = NDArray[np.float32]


@cache
def good_song() -> Samples:
    """Synthesised when a test asks for it: every process that collects tests imports this file."""
    return arranged_music(SECONDS, seed=11)


def measured(song: Samples) -> dict[str, float]:
    found = measures_of(song, RATE)
    assert found is not None
    return found


def tone(hz: float, gain: float = 0.8) -> Samples:
    return np.tile((gain * np.sin(2 * np.pi * hz * TIMES)).astype(np.float32), (2, 1))


def test_a_song_without_a_fault_has_none() -> None:
    found = measured(good_song())
    assert (found["silence"], found["longest_gap"]) == (0, 0)
    assert found["clipping"] < 1e-5
    assert found["loudness_jumps"] < 2.5
    assert found["noise"] < -40
    assert found["abrupt_end"] < -18


def test_silence_is_its_share_of_the_time_and_the_longest_one_in_seconds() -> None:
    broken = good_song().copy()
    for start, end in ((4, 6), (10, 11)):
        broken[:, start * RATE : end * RATE] = 0
    found = measured(broken)
    assert found["silence"] == pytest.approx(3 / SECONDS, abs=0.01)
    assert found["longest_gap"] == pytest.approx(2.0, abs=0.11)


@pytest.mark.parametrize("gain", [0.0, 1e-5])
def test_a_song_of_silence_is_all_silent(gain: float) -> None:
    assert measured(good_song() * np.float32(gain)) == {"silence": 1.0, "longest_gap": pytest.approx(SECONDS)}


@pytest.mark.parametrize("hz", [40, 110, 1_000, 9_000])
def test_the_smooth_top_of_a_tone_is_no_clipping(hz: float) -> None:
    assert measured(tone(hz))["clipping"] == 0


@pytest.mark.parametrize("hz", [40, 110, 1_000])
def test_a_tone_that_is_cut_off_is_clipped_at_whatever_level(hz: float) -> None:
    # Cut off at half of its height, a sine is at its peak for two thirds of the time.
    clipped = np.clip(tone(hz, 0.8), -0.4, 0.4) * np.float32(0.3)
    assert measured(clipped)["clipping"] == pytest.approx(2 / 3, abs=0.05)


def test_clipping_of_one_channel_counts_half() -> None:
    clipped = tone(110)
    clipped[1] = np.clip(clipped[1], -0.4, 0.4)
    assert measured(clipped)["clipping"] == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("decibels", [-12, 9, 15])
def test_a_jump_of_the_level_is_seen_in_decibels(decibels: float) -> None:
    broken = good_song().copy()
    broken[:, 7 * RATE : 13 * RATE] *= np.float32(10 ** (decibels / 20))
    assert measured(broken)["loudness_jumps"] == pytest.approx(abs(decibels), abs=4)


@pytest.mark.parametrize("decibels", [-20, -10])
def test_white_noise_is_seen_at_its_level(decibels: float) -> None:
    power = np.mean(good_song() ** 2) * 10 ** (decibels / 10)
    noise = np.random.default_rng(1).normal(0, np.sqrt(power), good_song().shape).astype(np.float32)
    # Loud moments are louder than the song is on average, and the quietest of some frames is below it.
    assert decibels - 18 < measured(good_song() + noise)["noise"] < decibels


def test_a_song_that_is_cut_off_ends_loud() -> None:
    assert measured(good_song()[:, : -3 * RATE])["abrupt_end"] > -12


def test_scaling_a_song_changes_nothing() -> None:
    broken = FAULTS["clipping"](good_song(), 1, np.random.default_rng(0))
    assert measured(broken * np.float32(0.1)) == pytest.approx(measured(broken), rel=1e-3, abs=1e-3)


def test_equal_songs_have_equal_measures() -> None:
    assert measured(good_song()) == measured(good_song().copy())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 12_345, -1])
def test_samples_that_are_no_numbers_are_no_song(value: float, place: int) -> None:
    broken = good_song().copy()
    broken[1, place] = value
    assert measures_of(broken, RATE) is None


def test_what_is_too_short_to_be_measured_has_no_measures() -> None:
    assert measures_of(good_song()[:, : RATE // 3], RATE) == {}


@pytest.mark.parametrize("rate", [44_100, 32_000])
def test_other_sample_rates_and_one_channel_are_measured(rate: int) -> None:
    found = measures_of(good_song()[:1], rate)
    assert found is not None
    assert set(found) == set(BUILT_IN.measures) - {"lyrics"}


@cache
def good_songs() -> list[Samples]:
    return [arranged_music(SONG_S, seed) for seed in range(100, 100 + SONGS)]


@cache
def good_scores() -> list[float]:
    return list(map(score, good_songs()))


def score(song: Samples) -> float:
    return BUILT_IN.score(measured(song))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("grade", [1, 2], ids=GRADES[1:])
def test_scores_agree_with_planted_faults(fault: str, grade: int) -> None:
    """The area under the ROC curve; ``bench_scores`` has more songs, recordings among them."""
    bad = [score(FAULTS[fault](song, grade, np.random.default_rng(n))) for n, song in enumerate(good_songs())]
    assert area_under_curve(good_scores(), bad) >= LEAST_AREA


@pytest.mark.parametrize("grade", [1, 2], ids=GRADES[1:])
def test_scores_agree_with_wrong_lyrics(grade: int) -> None:
    assert area_under_curve([lyrics_score(n, None) for n in range(20)], [lyrics_score(n, grade) for n in range(20)]) > (
        LEAST_AREA
    )


def lyrics_score(number: int, grade: int | None) -> float:
    return BUILT_IN.score({"lyrics": score_of_attention(sung_attention(np.random.default_rng(number), grade))})


def test_the_area_of_scores_that_say_nothing_is_a_half() -> None:
    assert area_under_curve([1, 0], [1, 0]) == 0.5
    assert area_under_curve([1, 1], [0, 0]) == 1
