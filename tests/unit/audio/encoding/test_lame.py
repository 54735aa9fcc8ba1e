# SPDX-License-Identifier: Apache-2.0
"""MP3 files by LAME against those of FFmpeg's own encoder: as long, and as near to the samples."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from acestep_consumer.audio.encoding import lame
from acestep_consumer.audio.encoding.encode import EncodingFailed, write_by_ffmpeg, write_song
from acestep_consumer.audio.formats import FORMATS, Format
from tests.support.music import music

RATE = 48_000


def mp3(bit_rate: int = 192_000, sample_rate: int | None = None) -> Format:
    return replace(FORMATS["mp3"], bit_rate=bit_rate, sample_rate=sample_rate)


def decoded(path: Path) -> NDArray[np.float32]:
    """The samples that a player gets: FFmpeg cuts off what the file's tag says."""
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)


def signal_to_noise_db(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum()))


def spectrum_db(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mean spectrum of the first channel, in 32 bands up to 16 kHz."""
    windows = samples[0, : samples.shape[1] // 2048 * 2048].reshape(-1, 2048) * np.hanning(2048)
    power = np.square(np.abs(np.fft.rfft(windows, axis=1))).mean(axis=0)[1:673]
    return np.asarray(10 * np.log10(power.reshape(32, -1).mean(axis=1) + 1e-9))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("bits", [192_000, 320_000])
@pytest.mark.parametrize("rate", [44_100, RATE])
def test_a_file_is_as_long_and_as_near_to_the_samples_as_ffmpegs(
    channels: int, bits: int, rate: int, tmp_path: Path
) -> None:
    song = music(2.5)[:channels, : 2 * RATE + 777]
    write_song(song, tmp_path / "lame.mp3", mp3(bits, rate), RATE)
    write_by_ffmpeg(song, tmp_path / "ffmpeg.mp3", mp3(bits, rate), RATE)
    ours, theirs = decoded(tmp_path / "lame.mp3"), decoded(tmp_path / "ffmpeg.mp3")
    assert ours.shape == (channels, -(-song.shape[1] * rate // RATE))
    # FFmpeg's files of some lengths are a little longer than the song.
    assert 0 <= theirs.shape[1] - ours.shape[1] < 1_152
    theirs = theirs[:, : ours.shape[1]]
    assert np.abs(spectrum_db(ours) - spectrum_db(theirs)).max() < 1
    if rate == RATE:
        assert signal_to_noise_db(ours, song) > signal_to_noise_db(theirs, song) - 0.5
    with av.open(str(tmp_path / "lame.mp3")) as container:
        stream = container.streams.audio[0]
        assert (stream.rate, stream.channels) == (rate, channels)
        assert stream.bit_rate == pytest.approx(bits, rel=0.01)


@pytest.mark.parametrize("length", [1, 1151, 1152, 1153, 65_536, 65_537])
def test_every_length_comes_back_to_the_sample(length: int, tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    write_song(music(2)[:, :length], path, mp3(), RATE)
    assert decoded(path).shape == (2, length)


def test_a_rate_that_mp3_does_not_have_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(EncodingFailed, match=r"^the mp3 encoder failed \(LameError\)$"):
        write_song(music(0.5), tmp_path / "song.mp3", mp3(), 7_001)
    assert list(tmp_path.iterdir()) == []


def test_samples_that_are_not_contiguous_floats_are_refused() -> None:
    options = lame.Mp3Options(channels=2, sample_rate=RATE, bit_rate=192_000, quality=7)
    for wrong in (np.zeros((2, 9)), np.zeros((9, 2), dtype=np.float32).T):
        with pytest.raises(lame.LameError, match="contiguous"):
            lame.write_mp3(io.BytesIO(), [wrong.astype(wrong.dtype, copy=False)], options)


def test_without_lameenc_ffmpeg_encodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lameenc", None)
    lame.library.cache_clear()
    try:
        assert lame.library() is None
        with pytest.raises(lame.LameError, match="missing"):
            lame.write_mp3(io.BytesIO(), [], lame.Mp3Options(channels=2, sample_rate=RATE, bit_rate=1, quality=7))
        write_song(music(0.5), tmp_path / "song.mp3", mp3(), RATE)
        assert decoded(tmp_path / "song.mp3").shape == (2, RATE // 2)
    finally:
        lame.library.cache_clear()
