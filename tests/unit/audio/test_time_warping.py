# SPDX-License-Identifier: Apache-2.0
"""Time warping against a plain loop over all cells, and the score of lyrics against planted faults."""

import numpy as np
import pytest
from numpy.typing import NDArray

from acestep_consumer.audio import time_warping
from acestep_consumer.audio.time_warping import Matrix, token_frames, warping_paths
from acestep_consumer.audio.time_warping import lyric_score as score


def plainly(gain: Matrix) -> list[list[int]]:
    """The same path, cell by cell."""
    tokens, frames = gain.shape
    sums = np.full((tokens + 1, frames + 1), np.inf)
    sums[0, 0] = 0.0
    steps = {}
    for token in range(1, tokens + 1):
        for frame in range(1, frames + 1):
            both, above, left = sums[token - 1, frame - 1], sums[token - 1, frame], sums[token, frame - 1]
            if both < above and both < left:
                best, before = both, (token - 1, frame - 1)
            elif above < both and above < left:
                best, before = above, (token - 1, frame)
            else:
                best, before = left, (token, frame - 1)
            sums[token, frame] = best - float(gain[token - 1, frame - 1])
            steps[token, frame] = before
    at, path = (tokens, frames), []
    while at != (0, 0):
        path.append([at[0] - 1, at[1] - 1])
        at = steps[at]
    return path[::-1]


@pytest.mark.parametrize(("tokens", "frames"), [(1, 1), (1, 9), (9, 1), (5, 5), (7, 40), (40, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_the_path_is_that_of_a_plain_loop(tokens: int, frames: int, seed: int) -> None:
    # Whole numbers: many ways through the matrix are equally good.
    gains = np.random.default_rng(seed).integers(-1, 2, (2, tokens, frames)).astype(np.float32)

    assert [path.tolist() for path in warping_paths(*gains)] == [plainly(gain) for gain in gains]


def test_large_matrices_have_the_paths_that_they_have_together(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = np.random.default_rng(0).random((2, 9, 40)).astype(np.float32)
    together = warping_paths(*gains)
    monkeypatch.setattr(time_warping, "_MOST_CELLS", 9)

    assert [path.tolist() for path in warping_paths(*gains)] == [path.tolist() for path in together]


def sung(tokens: int = 20, frames: int = 200, width: int = 2) -> NDArray[np.float32]:
    """The energy of a song whose tokens are sung one after the other."""
    at = (np.arange(tokens) + 0.5) * frames / tokens
    distance = np.abs(np.arange(frames)[None] - at[:, None])
    return np.exp(-((distance / (width * frames / tokens / 4)) ** 2)).astype(np.float32)


def test_each_token_has_the_frames_where_it_is_sung() -> None:
    (path,) = warping_paths(sung() - 0.2)
    first, last = token_frames(path).T

    assert (np.diff(first) >= 0).all()
    centres = (first + last) / 2
    assert centres[1:-1] == pytest.approx((np.arange(20)[1:-1] + 0.5) * 10, abs=3)


ALL = np.ones(20, dtype=bool)


def lyric_score(energy: Matrix, words: NDArray[np.bool_]) -> float:
    (path,) = warping_paths(energy**2)
    return score(energy, path, words)


def test_a_song_that_has_all_its_lyrics_scores_high() -> None:
    assert lyric_score(sung(), ALL) > 0.7


@pytest.mark.parametrize("missing", [5, 10, 15])
def test_the_score_falls_with_the_lyrics_that_are_not_sung(missing: int) -> None:
    energy = sung()
    energy[-missing:] = 0.0

    assert lyric_score(energy, ALL) <= (1 - missing / 20) ** 2


def test_lyrics_in_another_order_score_low() -> None:
    assert lyric_score(sung()[::-1].copy(), ALL) < 0.05


def test_section_tags_do_not_count_as_lyrics() -> None:
    energy = sung()
    energy[:5] = 0.0  # a tag that nobody sings

    assert lyric_score(energy, np.arange(20) >= 5) > 1.5 * lyric_score(energy, ALL)


def test_without_any_lyrics_the_score_is_0() -> None:
    assert lyric_score(sung(), ~ALL) == 0.0
