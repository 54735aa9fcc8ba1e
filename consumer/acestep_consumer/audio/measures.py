# SPDX-License-Identifier: Apache-2.0
"""Measures of a song's samples: silence, clipping, loudness jumps, noise, an abrupt end. Pure and deterministic.

They see faults of the sound, not whether the music is good. ``policy.scoring`` makes a score of them. All are relative
to the song's own level, so that scaling it, as normalisation does, changes none of them.

A song is read once, in blocks that stay in the cache; spectra are those of a few hundred short frames.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

SILENT_DB: Final = -50.0
"""Level below which 100 ms are silent: dB of the song's loud moments."""

_WINDOW_S: Final = 0.1
_LEAST_WINDOWS: Final = 5
_BLOCK: Final = 16
_CLIPPING_WINDOWS: Final = 600
"""Windows that are searched for clipping: a minute of sound."""
_LOUD_PERCENTILE: Final = 95
_FAINT: Final = 1e-8
"""Mean square that is silence in any song: -80 dB of full scale."""

_AT_PEAK: Final = 0.002
"""Distance from the peak of 100 ms, as a share of it, up to which a sample is at the peak."""
_LEAST_RUN: Final = 3
_CORNER: Final = 1.5
_QUIET_PEAK: Final = 0.1
"""Share of the song's peak below which the peak of 100 ms is not where it was cut off, but the rounding of a file."""

_FRAME: Final = 2_048
_HANN: Final = np.hanning(_FRAME).astype(np.float32)
_STRETCHES: Final = 32
_FRAMES_A_STRETCH: Final = 6
_NOISE_BAND_HZ: Final = (4_000.0, 14_000.0)
_NOISIEST: Final = 90

_JUMP_WINDOWS: Final = 10
_SUDDEN_WINDOWS: Final = 3
_SOUND_WINDOWS: Final = 20
_SOUND_DB: Final = -25.0
"""Level of two seconds from which on they are part of the song's middle, and no pause, beginning or end."""
_JUMPS: Final = 6
_BANDS_HZ: Final = (60.0, 250.0, 600.0, 1_500.0, 4_000.0, 12_000.0)
_BAND_FLOOR: Final = 1e-4
_END_WINDOWS: Final = 3
_TINY: Final = 1e-20
_LEAST_DB: Final = -120.0


def measures_of(samples: Samples, sample_rate: int) -> dict[str, float] | None:
    """Return the measures of a song by their names.

    - ``silence``: share of the time that is silent, 0 to 1.
    - ``longest_gap``: the longest silence in seconds, those at the beginning and the end too.
    - ``clipping``: share of the samples in flat runs at the peak of their 100 ms that begin with a corner, 0 to 1.
    - ``loudness_jumps``: the largest sudden change of level, less what its frequency bands differ in, in dB.
    - ``noise``: level of even noise in the noisiest tenth of the song, in dB of its loud moments.
    - ``abrupt_end``: level of the last 0.3 s in dB of the song's loud moments; near 0 where it is cut off.

    Args:
        samples: float samples of shape [channels, n], each row contiguous.
        sample_rate: Hz.

    Returns:
        None where samples are not finite numbers. An empty dictionary for less than half a second, which is not
        measured.
    """
    length = round(_WINDOW_S * sample_rate)
    power = _power_of(samples, length)
    if not np.isfinite(power).all() or not np.isfinite(samples[:, len(power) * length :]).all():
        return None
    if len(power) < _LEAST_WINDOWS:
        return {}
    loud = max(float(np.percentile(power, _LOUD_PERCENTILE)), _FAINT)
    silent = power < max(loud * 10 ** (SILENT_DB / 10), _FAINT)
    if silent.all():
        return {"silence": 1.0, "longest_gap": len(silent) * _WINDOW_S}
    return {
        "silence": float(silent.mean()),
        "longest_gap": _longest(silent) * _WINDOW_S,
        "clipping": _clipping(samples, length),
        "loudness_jumps": _largest_jump(samples, sample_rate, power / loud),
        "noise": _noise(samples, sample_rate, silent),
        "abrupt_end": float(10 * np.log10(max(power[-_END_WINDOWS:].mean(), _FAINT) / loud)),
    }


def _power_of(samples: Samples, length: int) -> Floats:
    """Return the mean square of all channels in each window of ``length`` samples."""
    count = samples.shape[1] // length
    rows = (channel[: count * length].reshape(count, length) for channel in samples)
    power = np.array([np.einsum("ij,ij->i", each, each) for each in rows], dtype=np.float64)
    return np.asarray(power.mean(axis=0) / length)


def _clipping(samples: Samples, length: int) -> float:
    """Return the share of samples in flat runs: estimated from evenly spaced windows where the song has too many."""
    count = samples.shape[1] // length
    step = -(-count // _CLIPPING_WINDOWS)
    peaks, flat = [], []
    for channel in samples:
        rows = channel[: count * length].reshape(count, length)[::step]
        for first in range(0, len(rows), _BLOCK):
            heights = np.abs(rows[first : first + _BLOCK])
            peaks.append(heights.max(axis=1))
            flat.append(_flat_samples(heights, peaks[-1]))
    peak = np.concatenate(peaks)
    return float(np.concatenate(flat)[peak >= _QUIET_PEAK * peak.max()].sum() / (len(peak) * length))


def _flat_samples(heights: Samples, peak: Samples) -> Floats:
    """Return how many samples of each row lie in flat runs at its peak that begin or end with a corner.

    Every wave is flat at its top for some samples. There, the sample beside the run is hardly lower than those in it;
    where a wave is cut off, it is much lower.
    """
    length = heights.shape[1]
    top = np.flatnonzero(heights >= (peak * np.float32(1 - _AT_PEAK))[:, None])
    begins = np.flatnonzero((np.diff(top, prepend=-2) != 1) | (top % length == 0))
    run = np.diff(begins, append=len(top))
    begins, run = begins[run >= _LEAST_RUN], run[run >= _LEAST_RUN]
    row, start = np.divmod(top[begins], length)
    before, after = np.maximum(start - 1, 0), np.minimum(start + run, length - 1)
    beside = np.minimum(heights[row, before], heights[row, after])
    smooth = _AT_PEAK * ((run + 2) / (run - 1)) ** 2
    cut_off = peak[row] - beside > _CORNER * smooth * peak[row]
    return np.asarray(np.bincount(row[cut_off], run[cut_off], len(heights)), dtype=np.float64)


def _longest(flags: Flags) -> int:
    """Return the length of the longest run of true values."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _noise(samples: Samples, sample_rate: int, silent: Flags) -> float:
    """Return the level of noise in the noisiest tenth of the song, dB.

    It is the geometric mean of the power spectrum from 4 to 14 kHz, which tones hardly raise, in the quietest of each
    few frames: drums are noise too, but not all the time. White noise as loud as the song has about -5 dB.
    """
    frames = samples.shape[1] // _FRAME
    count = min(frames, _STRETCHES * _FRAMES_A_STRETCH)
    starts = np.linspace(0, frames - 1, count).astype(np.int64) * _FRAME
    heard = starts[~silent[np.minimum(starts * len(silent) // samples.shape[1], len(silent) - 1)]]
    if not len(heard):
        return _LEAST_DB
    power = _spectra(samples, heard)
    band = power[:, _band(sample_rate, *_NOISE_BAND_HZ)]
    level = np.exp(np.log(band + _TINY).mean(axis=1)) * band.shape[1]
    stretches = np.array_split(level, max(len(level) // _FRAMES_A_STRETCH, 1))
    noisiest = np.percentile([each.min() for each in stretches], _NOISIEST)
    loud = np.percentile(power.sum(axis=1), _LOUD_PERCENTILE)
    return max(float(10 * np.log10((noisiest + _TINY) / (loud + _TINY))), _LEAST_DB)


def _largest_jump(samples: Samples, sample_rate: int, power: Floats) -> float:
    """Return the largest sudden change of level, in dB.

    Music gets louder by what is added to it, so that some bands of frequencies change more than others. A fault of the
    level changes all of them alike: the change counts less the standard deviation of the bands' changes.
    """
    changes = np.minimum(_changes(power, _JUMP_WINDOWS), _changes(power, _SUDDEN_WINDOWS))
    changes[~_within_sound(power)] = 0
    largest = 0.0
    for window in _highest_apart(changes):
        moment = round(window * _WINDOW_S * sample_rate)
        before, after = (_band_power(samples, sample_rate, moment, side) for side in (-1, 1))
        floor = _BAND_FLOOR * max(before.sum(), after.sum()) + _TINY
        difference = 10 * np.log10((after + floor) / (before + floor))
        largest = max(largest, float(changes[window] - difference.std()))
    return largest


def _within_sound(power: Floats) -> Flags:
    """Return whether there is sound in the two seconds before each window, and in those after its beginning."""
    width, within = _SOUND_WINDOWS, np.zeros(len(power), dtype=np.bool_)
    if len(power) > 2 * width:
        sound = _means(power, width) > 10 ** (_SOUND_DB / 10)
        within[width : len(power) - width + 1] = sound[:-width] & sound[width:]
    return within


def _means(power: Floats, width: int) -> Floats:
    sums = np.concatenate([[0.0], np.cumsum(power)])
    return np.asarray((sums[width:] - sums[:-width]) / width, dtype=np.float64)


def _changes(power: Floats, width: int) -> Floats:
    """Return, for the beginning of each window, by how many dB the level after it differs from that before."""
    means = np.maximum(_means(power, width), 10 ** (SILENT_DB / 10))
    changes = np.zeros(len(power))
    if len(power) > 2 * width:
        changes[width : len(power) - width + 1] = np.abs(10 * np.log10(means[width:] / means[:-width]))
    return changes


def _highest_apart(values: Floats) -> Iterator[int]:
    """Yield the places of the highest values that are not beside a higher one."""
    left = values.copy()
    for _ in range(_JUMPS):
        place = int(left.argmax())
        if left[place] <= 0:
            return
        yield place
        left[max(place - _JUMP_WINDOWS // 2, 0) : place + _JUMP_WINDOWS // 2 + 1] = 0


def _band_power(samples: Samples, sample_rate: int, moment: int, side: int) -> Floats:
    """Return the power of each band in the second before (``side`` -1) or after (1) a moment."""
    gap = round(_WINDOW_S / 2 * sample_rate)
    offsets = np.arange(gap, round(_JUMP_WINDOWS * _WINDOW_S * sample_rate) - _FRAME, 2 * _FRAME)
    starts = moment + offsets if side > 0 else moment - offsets - _FRAME
    starts = starts[(starts >= 0) & (starts + _FRAME <= samples.shape[1])]
    power = _spectra(samples, starts).mean(axis=0)
    edges = pairwise(_BANDS_HZ)
    return np.array([power[_band(sample_rate, *edge)].sum() for edge in edges])


def _spectra(samples: Samples, starts: NDArray[np.int64]) -> Floats:
    """Return the power spectra of the channels' mean in frames that start there, [frames, bins]."""
    frames = samples[:, starts[:, None] + np.arange(_FRAME)].mean(axis=0)
    spectra = np.fft.rfft(frames * _HANN)
    return np.asarray(spectra.real**2 + spectra.imag**2, dtype=np.float64)


def _band(sample_rate: int, low_hz: float, high_hz: float) -> slice:
    return slice(round(low_hz * _FRAME / sample_rate), round(high_hz * _FRAME / sample_rate))
