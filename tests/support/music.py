# SPDX-License-Identifier: Apache-2.0
"""Synthesised sound that is like music: chords of decaying tones with overtones, and short noises on the beat."""

import numpy as np
from numpy.typing import NDArray

BEAT_S = 0.5
_TONE_S = 1.5
_OVERTONES = 8


def music(seconds: float, sample_rate: int = 48_000, seed: int = 0) -> NDArray[np.float32]:
    """Return float samples of shape [2, n], with a peak of 0.89. Equal seeds make equal sounds."""
    rng = np.random.default_rng(seed)
    song = np.zeros((2, round(seconds * sample_rate)), dtype=np.float32)
    times = np.arange(round(_TONE_S * sample_rate)) / sample_rate
    attack, overtones = np.minimum(1, times / 0.01), np.arange(1, _OVERTONES + 1)[:, None]
    decays = np.exp(-3 * times * (1 + 0.2 * overtones)) / overtones
    hit = np.exp(-40 * times[: sample_rate // 10])
    for start in range(0, song.shape[1], round(BEAT_S * sample_rate)):
        hz = 110 * 2 ** (rng.integers(0, 36) / 12)
        phases = rng.uniform(0, 2 * np.pi, (_OVERTONES, 1))
        tone = 0.2 * attack * (decays * np.sin(2 * np.pi * hz * overtones * times + phases)).sum(axis=0)
        left = rng.uniform(0.3, 0.7)
        _add(song, start, np.stack((left * tone, (1 - left) * tone)))
        _add(song, start, 0.1 * hit * rng.normal(0, 1, (2, len(hit))))
    song *= np.float32(0.89) / np.abs(song).max()
    return song


def _add(song: NDArray[np.float32], start: int, sound: NDArray[np.float64]) -> None:
    length = min(sound.shape[1], song.shape[1] - start)
    song[:, start : start + length] += sound[:, :length].astype(np.float32)
