# SPDX-License-Identifier: Apache-2.0
"""The waveform overview in an event: what its bytes say, and that it is small."""

import base64
from pathlib import Path

import numpy as np
import pytest

from acestep_consumer.audio.codec import encode
from acestep_consumer.audio.peaks import MAX_PEAKS, peaks_of
from acestep_schemas import events


def values(text: str) -> list[int]:
    return list(base64.b64decode(text, validate=True))


def test_each_byte_is_the_loudest_sample_of_its_slice_in_either_channel_and_sign() -> None:
    samples = np.zeros((2, MAX_PEAKS * 10), dtype=np.float32)
    samples[0, 5] = 0.5
    samples[1, 13] = -1.0
    samples[0, 14] = 0.25
    samples[0, -1] = 0.2
    found = values(peaks_of(samples))
    assert len(found) == MAX_PEAKS == events.MAX_PEAKS == 400
    assert (found[0], found[1], found[2], found[-1]) == (128, 255, 0, 51)
    assert sum(found) == 128 + 255 + 51


@pytest.mark.parametrize("length", [1, 399, 400, 401, 479_999])
def test_a_song_of_any_length_has_no_more_than_four_hundred_bytes_and_none_of_its_samples_is_missed(
    length: int,
) -> None:
    for at in (0, length // 2, length - 1):
        samples = np.zeros((1, length), dtype=np.float32)
        samples[0, at] = -0.8
        found = values(peaks_of(samples))
        assert len(found) == min(length, 400)
        assert (max(found), len(peaks_of(samples)) <= 536) == (204, True)


def test_what_is_over_full_scale_counts_as_full_scale() -> None:
    assert values(peaks_of(np.full((2, 4), -3.0, dtype=np.float32))) == [255] * 4


def test_an_encoded_song_has_its_peaks(tmp_path: Path) -> None:
    samples = np.stack([np.linspace(0, 1, 4_800, dtype=np.float32)] * 2)
    encoded = encode(samples, tmp_path / "0", "wav", 48_000)
    found = values(encoded.peaks)
    assert found == sorted(found)
    assert (found[0], found[-1]) == (1, 255)
