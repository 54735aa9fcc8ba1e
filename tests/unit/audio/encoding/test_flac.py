# SPDX-License-Identifier: Apache-2.0
"""FLAC on several threads: FFmpeg's own file on one thread is what it is compared with, to the byte."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from acestep_consumer.audio.encoding import encode
from acestep_consumer.audio.encoding.encode import EncodingFailed, Samples, write_by_ffmpeg, write_song
from acestep_consumer.audio.formats import FORMATS
from tests.support.music import music

RATE = 48_000
BLOCK = 4_608
TAGGED = replace(FORMATS["flac"], tags=(("title", "A song"), ("lyrics", "夜の街")))


def noise(length: int, channels: int = 2) -> Samples:
    return np.random.default_rng(3).normal(0, 0.4, (channels, length)).astype(np.float32)


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize(
    "length",
    [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 7 * BLOCK + 17, 130 * BLOCK, 131 * BLOCK + 4_607],
    ids=lambda length: f"{length} samples",
)
def test_the_file_is_that_of_one_thread(length: int, threads: int, tmp_path: Path) -> None:
    # From frame 128 on, a frame's number takes two bytes.
    alone, together = tmp_path / "alone.flac", tmp_path / "together.flac"
    write_by_ffmpeg(noise(length), alone, TAGGED, RATE)
    write_song(noise(length), together, TAGGED, RATE, threads)
    assert together.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 1), (44_100, 2), (16_000, 2), (47_999, 1)])
def test_every_rate_and_number_of_channels_is_written_as_by_one_thread(
    rate: int, channels: int, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone.flac", tmp_path / "together.flac"
    song = noise(20 * BLOCK, channels)
    write_by_ffmpeg(song, alone, FORMATS["flac"], rate)
    write_song(song, together, FORMATS["flac"], rate, 4)
    assert together.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize("wanted", [{"compression_level": "8"}, {"sample_rate": 44_100}], ids=str)
def test_a_format_with_other_values_is_written_as_by_one_thread(wanted: dict[str, Any], tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.flac", tmp_path / "together.flac"
    song, other = music(3.0), replace(FORMATS["flac"], **wanted)
    write_by_ffmpeg(song, alone, other, RATE)
    write_song(song, together, other, RATE, 4)
    assert together.read_bytes() == alone.read_bytes()


def test_numbers_of_three_bytes_are_written_as_by_one_thread(tmp_path: Path) -> None:
    # Frame 2,048 begins at 197 s.
    alone, together = tmp_path / "alone.flac", tmp_path / "together.flac"
    song = music(200.0)
    write_by_ffmpeg(song, alone, FORMATS["flac"], RATE)
    write_song(song, together, FORMATS["flac"], RATE, 4)
    assert together.read_bytes() == alone.read_bytes()


def test_a_decoder_finds_the_samples_and_every_checksum(tmp_path: Path) -> None:
    song, path = music(30.0), tmp_path / "song.flac"
    write_song(song, path, TAGGED, RATE, 4)
    with av.open(str(path), options={"err_detect": "crccheck+explode"}) as container:
        assert container.metadata["title"] == "A song"
        found = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    samples = found.reshape(-1, 2).T.astype(np.float32) / 32_768
    assert samples.shape == song.shape
    np.testing.assert_allclose(samples, song.clip(-1, 1), atol=1.01 / 32_768)


def test_an_encoder_that_fails_on_one_thread_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, begun = tmp_path / "song.flac", iter([False, True, False, False])

    def frames_of(samples: Samples, sample_rate: int) -> object:
        return frames(samples, 0 if next(begun) else sample_rate)

    frames = encode.frames_of
    monkeypatch.setattr(encode, "frames_of", frames_of)
    with pytest.raises(EncodingFailed, match="the flac encoder failed"):
        write_song(noise(40 * BLOCK), path, TAGGED, RATE, 2)
    assert not path.exists()
