# SPDX-License-Identifier: Apache-2.0
"""Loudness against signals of known loudness: EBU Tech 3341's and plain tones."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from acestep_consumer.audio.codec import Samples, decode, encode
from acestep_consumer.audio.encoding import encode as encoding
from acestep_consumer.audio.encoding.loudness import gain_db, measure
from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.audio.levels import Levels

RATE = 48_000
WAV = FORMATS["wav32"]


def tone(*parts: tuple[float, float], hertz: float = 1_000.0, phase: float = 0.0) -> Samples:
    """Return a stereo sine of successive (level in dB of full scale, seconds)."""
    levels = np.concatenate([np.full(int(seconds * RATE), 10 ** (db / 20)) for db, seconds in parts])
    time = np.arange(len(levels)) / RATE
    # A tone that begins at once overshoots between its first samples.
    mono = levels * np.sin(2 * np.pi * hertz * time + phase) * np.minimum(1, np.minimum(time, time[::-1]) / 0.05)
    return np.stack([mono, mono]).astype(np.float32)


def measured(samples: Samples) -> Levels:
    return measure(encoding.frames_of(samples, RATE), "stereo", RATE)


@pytest.mark.parametrize(
    ("parts", "lufs"),
    [
        # Cases 1 to 5 of EBU Tech 3341, minimum requirements for integrated loudness.
        ([(-23.0, 20)], -23.0),
        ([(-33.0, 20)], -33.0),
        ([(-36.0, 10), (-23.0, 60), (-36.0, 10)], -23.0),
        ([(-72.0, 10), (-36.0, 10), (-23.0, 60), (-36.0, 10), (-72.0, 10)], -23.0),
        ([(-26.0, 20), (-20.0, 20.1), (-26.0, 20)], -23.0),
    ],
)
def test_integrated_loudness_is_that_of_the_ebus_signals(parts: Iterable[tuple[float, float]], lufs: float) -> None:
    assert measured(tone(*parts)).lufs == pytest.approx(lufs, abs=0.1)


@pytest.mark.parametrize(
    ("level_db", "hertz", "degrees", "peak_db"),
    [
        # Cases 15 to 18 of EBU Tech 3341: the samples miss the peaks; +0.2 and -0.4 dB are allowed.
        (-6.0, 12_000.0, 0.0, -6.0),
        (-6.0, 12_000.0, 45.0, -6.0),
        (-6.0, 8_000.0, 60.0, -6.0),
        (-6.0, 6_000.0, 67.5, -6.0),
    ],
)
def test_true_peaks_between_the_samples_count(level_db: float, hertz: float, degrees: float, peak_db: float) -> None:
    found = measured(tone((level_db, 2), hertz=hertz, phase=np.deg2rad(degrees)))

    assert peak_db - 0.4 <= found.true_peak_db <= peak_db + 0.2


def test_silence_has_no_loudness_and_stays_silent() -> None:
    found = measured(np.zeros((2, 5 * RATE), dtype=np.float32))

    assert found.lufs is None
    assert gain_db(found, -14.0, -1.0) == 0.0


def test_a_song_is_brought_to_its_loudness(tmp_path: Path) -> None:
    made = encode(tone((-30.0, 5)), tmp_path / "0", replace(WAV, loudness_lufs=-16.0), RATE)

    assert made.levels is not None
    assert made.levels.lufs == pytest.approx(-16.0, abs=0.001)
    assert measured(decode(made.path, sample_rate=RATE, max_seconds=10)).lufs == pytest.approx(-16.0, abs=0.1)


def test_the_true_peak_is_a_ceiling(tmp_path: Path) -> None:
    loud = replace(WAV, loudness_lufs=-9.0, true_peak_db=-2.0)
    clicks = tone((-30.0, 5))
    clicks[:, RATE : 2 * RATE : 4_800] = 0.5

    made = encode(clicks, tmp_path / "0", loud, RATE)

    assert made.levels is not None
    assert made.levels.lufs is not None
    assert made.levels.lufs < -9.0
    assert made.levels.true_peak_db == pytest.approx(-2.0, abs=0.01)
    assert measured(decode(made.path, sample_rate=RATE, max_seconds=10)).true_peak_db == pytest.approx(-2.0, abs=0.1)


def test_a_song_whose_level_stays_is_not_measured(tmp_path: Path) -> None:
    assert encode(tone((-30.0, 1)), tmp_path / "0", WAV, RATE).levels is None
