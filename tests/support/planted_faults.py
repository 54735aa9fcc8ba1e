# SPDX-License-Identifier: Apache-2.0
"""Faults planted into sound by hand, in three grades, and songs to plant them in.

A fault is a function of a song, [2, samples] at 48 kHz, its grade (0 mild, 1 clear, 2 severe) and a random generator.
The songs are synthesised; recordings can be read from files.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import av
import numpy as np
from numpy.typing import NDArray

from acestep_consumer.audio.time_warping import lyric_score, warping_paths

RATE: Final = 48_000
GRADES: Final = ("mild", "clear", "severe")

Song = NDArray[np.float32]
Fault = Callable[[Song, int, np.random.Generator], Song]

_PEAK = 0.89
_BLOCK = 256


def arranged_music(seconds: float, seed: int) -> Song:
    """Return a song with an arrangement: bass, chords, melody, drums and hi-hats come and go, by sections of 8 beats.

    It begins and ends with a fade, as songs do; loudness changes between sections by some dB.
    """
    rng = np.random.default_rng(seed)
    length, beat = round(seconds * RATE), round(rng.uniform(0.35, 0.65) * RATE)
    song, root = np.zeros((2, length)), 55 * 2 ** (rng.integers(0, 12) / 12)
    parts = np.ones(5)
    for number, start in enumerate(range(0, length, beat)):
        if number % 8 == 0:
            parts = rng.uniform(0.3, 1.0, 5) * (rng.uniform(size=5) < 0.75)
            parts[rng.integers(0, 3)] = 1.0
            degrees = rng.choice((1, 9 / 8, 4 / 3, 3 / 2, 5 / 3), 4)
        chord = root * degrees[number // 2 % 4]
        tones = (
            (0, chord, 1.5, 0.5),
            *((1, 4 * chord * step, 2.5, 0.12) for step in (1, 1.25, 1.5)),
            (2, 8 * root * rng.choice((1, 9 / 8, 5 / 4, 3 / 2, 5 / 3, 2)), 4.0, 0.2),
        )
        for part, hz, decay, gain in tones:
            _add(song, start, parts[part] * gain * _tone(hz, 2 * beat, decay, rng))
        if number % 2 == 0:
            _add(song, start, parts[3] * 0.6 * _kick(beat))
        for half in (0, beat // 2):
            _add(song, start + half, parts[4] * 0.15 * _hat(beat // 4, rng))
    fade = round(1.5 * RATE)
    song[:, :fade] *= np.linspace(0, 1, fade)
    song[:, -fade:] *= np.linspace(1, 0, fade)
    return _scaled(song)


def recordings(files: list[Path], seconds: float, each: int) -> Iterator[Song]:
    """Yield ``each`` parts of every recording, of this length, evenly over the file."""
    for file in files:
        whole = _read(file)
        length = min(round(seconds * RATE), whole.shape[1])
        for start in np.linspace(0, whole.shape[1] - length, each).astype(int):
            yield _scaled(whole[:, start : start + length])


def silence(song: Song, grade: int, rng: np.random.Generator) -> Song:
    """Return the song with 6, 20 or 50% of it silent: one stretch, or the end."""
    length = round((0.06, 0.2, 0.5)[grade] * song.shape[1])
    start = song.shape[1] - length if rng.uniform() < 0.3 else rng.integers(0, song.shape[1] - length)
    broken = song.copy()
    broken[:, start : start + length] = 0
    return broken


def noise(song: Song, grade: int, rng: np.random.Generator) -> Song:
    """Return the song with white noise 25, 15 or 5 dB below it, everywhere or in a third of it."""
    power = np.mean(song.astype(np.float64) ** 2) * 10 ** (-(25, 15, 5)[grade] / 10)
    broken, part = song.copy(), _part(song, rng)
    broken[:, part] += rng.normal(0, np.sqrt(power), broken[:, part].shape).astype(np.float32)
    return _scaled(broken)


def clipping(song: Song, grade: int, rng: np.random.Generator) -> Song:
    """Return the song with its level raised by 4, 8 or 16 dB over full scale and cut off there, likewise."""
    broken, part = song.copy(), _part(song, rng)
    gain = 10 ** ((4, 8, 16)[grade] / 20) / np.abs(broken[:, part]).max()
    broken[:, part] = np.clip(broken[:, part] * gain, -1, 1)
    return _scaled(broken)


def loudness_jumps(song: Song, grade: int, rng: np.random.Generator) -> Song:
    """Return the song with the level of a part changed by 6, 10 or 18 dB from one sample to the next."""
    length = round(rng.uniform(0.15, 0.4) * song.shape[1])
    start = rng.integers(round(0.15 * song.shape[1]), song.shape[1] - length - round(0.15 * song.shape[1]))
    broken = song.copy()
    broken[:, start : start + length] *= 10 ** ((6, 10, 18)[grade] * rng.choice((-1, 1)) / 20)
    return _scaled(broken)


FAULTS: Final[Mapping[str, Fault]] = MappingProxyType(
    {"silence": silence, "noise": noise, "clipping": clipping, "loudness_jumps": loudness_jumps}
)


def sung_attention(rng: np.random.Generator, grade: int | None = None) -> NDArray[np.float32]:
    """Return attention to lyrics, [tokens, frames], 0 to 1: made up, of lyrics that are sung in order over noise.

    ``grade`` plants wrong lyrics: a fifth of the lines is not sung; every second line is sung somewhere else; other
    words are sung, so that there is nothing but noise. None: all are sung.
    """
    lines, tokens, frames = rng.integers(8, 20), rng.integers(6, 12), rng.integers(300, 900)
    count = lines * tokens
    times = (np.arange(count) + 0.5 + rng.uniform(-0.3, 0.3, count)) / count
    strength = rng.uniform(0.3, 1.0, count)
    if grade == 0:
        strength[np.repeat(rng.permutation(lines) < max(lines // 5, 1), tokens)] = 0
    elif grade == 1:
        order = np.arange(lines)
        order[::2] = rng.permutation(order[::2])
        times = times.reshape(lines, tokens)[order].ravel()
    elif grade == 2:
        strength[:] = 0
    distance = np.arange(frames) - times[:, None] * frames
    found = strength[:, None] * np.exp(-((distance / 3) ** 2)) + rng.exponential(0.02, (count, frames))
    return np.asarray(np.clip((found - found.min()) / (found.max() - found.min()), 0, 1), dtype=np.float32)


def score_of_attention(energy: NDArray[np.float32]) -> float:
    """Return the score of lyrics without section tags, by the attention to them."""
    (path,) = warping_paths(energy**2)
    return lyric_score(energy, path, np.ones(len(energy), dtype=np.bool_))


def area_under_curve(good: list[float], bad: list[float]) -> float:
    """Return the area under the ROC curve: how often a good song has a better score than a bad one; a tie is half."""
    better = np.array(good)[:, None] - np.array(bad)[None, :]
    return float(np.mean((better > 0) + 0.5 * (better == 0)))


def _part(song: Song, rng: np.random.Generator) -> slice:
    """Return the whole song, or a third of it."""
    if rng.uniform() < 0.5:
        return slice(None)
    third = song.shape[1] // 3
    start = rng.integers(0, song.shape[1] - third)
    return slice(start, start + third)


def _read(file: Path) -> Song:
    with av.open(str(file)) as container:
        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray() for frame in frames], axis=1)


def _tone(hz: float, length: int, decay: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a tone of overtones that decay, [2, length].

    Each is a geometric series, so that its samples are products of every 256th power and the first 256.
    """
    overtones = np.arange(1, 9)[:, None]
    overtones = overtones[overtones[:, 0] * hz < RATE / 3]
    phases = rng.uniform(0, 2 * np.pi, (len(overtones), 1))
    powers = (2j * np.pi * hz * overtones - decay * overtones**0.5) / RATE
    coarse = np.exp(1j * phases + powers * np.arange(0, length, _BLOCK)) / overtones
    waves = (coarse.T @ np.exp(powers * np.arange(_BLOCK))).imag.ravel()[:length]
    left = rng.uniform(0.3, 0.7)
    return np.asarray(np.minimum(1, np.arange(length) / RATE / 0.01) * np.outer((left, 1 - left), waves))


def _kick(length: int) -> NDArray[np.float64]:
    times = np.arange(length) / RATE
    return np.tile(np.exp(-12 * times) * np.sin(2 * np.pi * (50 * times + 3 * (1 - np.exp(-30 * times)))), (2, 1))


def _hat(length: int, rng: np.random.Generator) -> NDArray[np.float64]:
    hiss = np.diff(rng.normal(0, 1, (2, length + 1)), axis=1)
    return np.exp(-60 * np.arange(length) / RATE) * hiss


def _add(song: NDArray[np.float64], start: int, sound: NDArray[np.float64]) -> None:
    length = max(min(sound.shape[1], song.shape[1] - start), 0)
    song[:, start : start + length] += sound[:, :length]


def _scaled(song: NDArray[np.float64] | Song) -> Song:
    return np.asarray(song * (_PEAK / max(np.abs(song).max(), 1e-9)), dtype=np.float32)
