# SPDX-License-Identifier: Apache-2.0
"""Dynamic time warping (DTW) of lyrics against a song, and a score of how well they are sung. NumPy alone.

Both are ACE-Step's, to the bit: where two ways through the matrix are equally good, rounding and the order of
comparisons decide, and so the sums are made in its order, in float64. A whole anti-diagonal is computed at a time.

That is thousands of short calls of NumPy, each of which gives the interpreter away and wants it back: several songs at
a time belong into processes of their own (``encoding.pool``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Path = NDArray[np.int64]
"""A way through [tokens, frames]: the token and the frame of each step, [steps, 2]."""

_SUNG_AT_ALL: Final = 0.1
"""Least maximum of a token that counts as sung; the loudest of the song is 1."""
_HEARD: Final = 0.01
"""Least energy that counts for the place of a token."""
_MOST_CELLS: Final = 1 << 23
_MAY_PRECEDE: Final = 9
"""Frames by which a token may lie before the one before it without being out of order."""


@dataclass(frozen=True, slots=True)
class WarpedLyrics:
    """Frames of each token of the lyrics, its first and its last one, and how well they are sung, 0 to 1."""

    frames: list[tuple[int, int]]
    score: float


Warp = Callable[[Matrix, NDArray[np.bool_]], WarpedLyrics]
"""``warped``, in whatever process."""


def warped(matrices: Matrix, sung: NDArray[np.bool_]) -> WarpedLyrics:
    """Warp lyrics onto their song.

    Args:
        matrices: consensus and energy of the heads, finite, [2, tokens, frames].
        sung: which tokens are lyrics, [tokens].
    """
    consensus, energy = matrices
    path, path_of_energy = warping_paths(consensus, energy**2)
    frames = [(first, last) for first, last in token_frames(path).tolist()]
    return WarpedLyrics(frames, lyric_score(energy, path_of_energy, sung))


def token_frames(path: Path) -> NDArray[np.int64]:
    """Return the first and the last frame of each token on a path, [tokens, 2]."""
    tokens = np.arange(path[-1, 0] + 1)
    first = np.searchsorted(path[:, 0], tokens)
    last = np.searchsorted(path[:, 0], tokens, side="right") - 1
    return np.stack([path[first, 1], path[last, 1]], axis=1)


def lyric_score(energy: Matrix, path: Path, sung: NDArray[np.bool_]) -> float:
    """Return how well a song has its lyrics: coverage² · order² · confidence, 0 to 1.

    Args:
        energy: mean attention of the heads, scaled to 0 to 1, [tokens, frames].
        path: the warping path of the energy's square.
        sung: which tokens are lyrics, [tokens]; the others are section tags such as ``[Chorus]``.
    """
    words = energy[sung]
    if not words.size:
        return 0.0
    # Thresholds and sums are the original's, in float64.
    coverage = float((words.max(axis=1).astype(np.float64) > _SUNG_AT_ALL).mean())
    confidence = float(energy[path[:, 0], path[:, 1]].mean(dtype=np.float64))
    return coverage**2 * _order(words) ** 2 * confidence


def _order(words: Matrix) -> float:
    """Return the share of tokens that lie after the one before."""
    weights = np.where(words > np.float64(_HEARD), words, np.float64(0.0))
    sums = weights.sum(axis=1)
    centres = (weights @ np.arange(words.shape[1]))[sums > 0] / sums[sums > 0]
    if len(centres) < 2:  # noqa: PLR2004 - an order needs two
        return 1.0
    return float((centres[1:] >= centres[:-1] - _MAY_PRECEDE).mean())


def warping_paths(*gains: Matrix) -> list[Path]:
    """Return the path through each of some matrices of one shape, [tokens, frames], with the largest sum.

    They are done together, which takes half as long as one after the other; large ones one by one, to save memory.
    """
    if len(gains) > 1 and sum(gain.size for gain in gains) > _MOST_CELLS:
        return [path for gain in gains for path in warping_paths(gain)]
    sums = _sums(gains)
    return [_path(sums, number, *gain.shape) for number, gain in enumerate(gains)]


def _path(sums: NDArray[np.float64], number: int, token: int, frame: int) -> Path:
    """Return the way back from the last token and the last frame, both counted from 1."""
    _, matrices, width = sums.shape
    diagonal, steps = matrices * width, []
    costs = sums.reshape(-1).data  # whose numbers are Python's: ten times as fast as NumPy's, one by one
    while token:
        steps.append((token - 1, frame - 1))
        here = (token + frame) * diagonal + number * width + token
        both, above, left = costs[here - 2 * diagonal - 1], costs[here - diagonal - 1], costs[here - diagonal]
        if both < above and both < left:
            token, frame = token - 1, frame - 1
        elif above < both and above < left:
            token -= 1
        else:
            frame -= 1
    return np.array(steps[::-1])


def _sums(gains: Sequence[Matrix]) -> NDArray[np.float64]:
    """Return the cost of the way to each cell, [token + frame, matrices, token], both counted from 1.

    Where there is no cell, it is infinite: each anti-diagonal can be computed as a whole, one row of memory.
    """
    tokens, frames = gains[0].shape
    sums = np.empty((tokens + frames + 1, len(gains), tokens + 1))
    sums[:2] = sums[:, :, 0] = np.inf
    sums[0, :, 0] = 0.0
    sums[2:, :, 1:] = _skewed_costs(gains).transpose(2, 0, 1)
    rows = sums.reshape(len(sums), -1)
    equal, least = np.empty(rows.shape[1] - 1, dtype=bool), np.empty(rows.shape[1] - 1)
    before, after = [row[:-1] for row in rows], [row[1:] for row in rows]
    for both, above, left, here in zip(before, before[1:], after[1:], after[2:], strict=False):
        np.minimum(both, above, out=least)
        np.minimum(least, left, out=least)
        # As in the original: where those two are equal, the frame before is taken, even if it costs more.
        np.copyto(least, left, where=np.equal(both, above, out=equal))
        np.add(here, least, out=here)
    return sums


def _skewed_costs(gains: Sequence[Matrix]) -> NDArray[np.float32]:
    """Return the costs by anti-diagonals, [matrices, tokens, tokens + frames - 1]; infinite where there is no cell."""
    tokens, frames = gains[0].shape
    padded = np.full((len(gains), tokens, frames + tokens), np.inf, dtype=np.float32)
    for gain, row in zip(gains, padded, strict=True):
        np.negative(gain, out=row[:, :frames])
    # One entry less a row: each row is shifted by one against the row above.
    across = frames + tokens - 1
    return padded.reshape(len(gains), -1)[:, : tokens * across].reshape(len(gains), tokens, across)
