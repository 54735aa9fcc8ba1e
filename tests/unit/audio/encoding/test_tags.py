# SPDX-License-Identifier: Apache-2.0
"""Tags of files, read back with mutagen, and what they leave of the sound."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutagen.aac
import mutagen.id3
import numpy as np
import pytest

from acestep_consumer.audio.codec import Samples, decode, encode
from acestep_consumer.audio.encoding.tags import id3
from acestep_consumer.audio.formats import FORMATS

RATE = 48_000
TAGS = (
    ("title", "Nächtliche Fahrt, 夜の道"),
    ("comment", "Generated"),
    ("lyrics", "[Verse]\nla la\n君を待つ"),
    ("syncedlyrics", "[00:00.00][Verse]\n[00:01.60]la la\n[01:02.04]君を待つ"),
    ("seed", "7"),
)


@pytest.fixture
def song() -> Samples:
    time = np.arange(2 * RATE, dtype=np.float32) / RATE
    tones = np.stack([np.sin(440 * np.pi * 2 * time), np.sin(660 * np.pi * 2 * time)])
    return np.asarray(tones / 2, dtype=np.float32)


def written(song: Samples, folder: Path, name: str, *, tagged: bool) -> Path:
    wanted = replace(FORMATS[name], tags=TAGS if tagged else ())
    return encode(song, folder / ("tagged" if tagged else "plain"), wanted, RATE).path


@pytest.mark.parametrize("name", ["mp3", "wav", "wav32", "aac"])
def test_an_id3_tag_has_title_lyrics_and_seed(name: str, song: Samples, tmp_path: Path) -> None:
    path = written(song, tmp_path, name, tagged=True)

    found: Any = mutagen.File(path).tags if name != "aac" else mutagen.id3.ID3(path)

    assert found.version == (2, 4, 0)
    assert found["TIT2"].text == ["Nächtliche Fahrt, 夜の道"]
    assert found.getall("COMM")[0].text == ["Generated"]
    assert found.getall("USLT")[0].text == "[Verse]\nla la\n君を待つ"
    assert found.getall("SYLT")[0].text == [("[Verse]", 0), ("la la", 1_600), ("君を待つ", 62_040)]
    assert found.getall("SYLT")[0].format == 2  # milliseconds
    assert found["TXXX:SEED"].text == ["7"]


@pytest.mark.parametrize("name", ["flac", "ogg", "opus"])
def test_vorbis_comments_have_title_lyrics_and_seed(name: str, song: Samples, tmp_path: Path) -> None:
    found: Any = mutagen.File(written(song, tmp_path, name, tagged=True)).tags

    assert found["title"] == ["Nächtliche Fahrt, 夜の道"]
    assert found["description"] == ["Generated"]
    assert found["lyrics"] == ["[Verse]\nla la\n君を待つ"]
    assert found["syncedlyrics"] == ["[00:00.00][Verse]\n[00:01.60]la la\n[01:02.04]君を待つ"]
    assert found["seed"] == ["7"]


@pytest.mark.parametrize("name", list(FORMATS))
def test_tags_change_neither_sound_nor_length(name: str, song: Samples, tmp_path: Path) -> None:
    plain = decode(written(song, tmp_path, name, tagged=False), sample_rate=RATE, max_seconds=10)
    tagged = decode(written(song, tmp_path, name, tagged=True), sample_rate=RATE, max_seconds=10)

    assert plain.shape == tagged.shape
    assert np.array_equal(plain, tagged)
    if name not in {"aac", "ogg", "opus"}:  # these decode to a little more
        assert tagged.shape[1] == song.shape[1]


def test_an_mp3_with_tags_keeps_its_lame_tag(song: Samples, tmp_path: Path) -> None:
    found = mutagen.File(written(song, tmp_path, "mp3", tagged=True))

    assert found.info.encoder_info.startswith("LAME")
    assert found.info.length == pytest.approx(2.0, abs=0.001)


def test_aac_with_tags_is_read_as_aac(song: Samples, tmp_path: Path) -> None:
    found = mutagen.aac.AAC(written(song, tmp_path, "aac", tagged=True))

    assert found.info.sample_rate == RATE


@pytest.mark.parametrize("name", ["mp3", "wav", "flac", "aac"])
def test_the_same_tags_make_the_same_bytes(name: str, song: Samples, tmp_path: Path) -> None:
    first, second = (
        hashlib.sha256(written(song, folder, name, tagged=True).read_bytes()).hexdigest()
        for folder in (tmp_path, tmp_path)
    )
    assert first == second


def test_no_tags_are_no_bytes() -> None:
    assert id3({}) == b""


def test_a_wav_file_of_the_size_that_it_says(song: Samples, tmp_path: Path) -> None:
    data = written(song, tmp_path, "wav", tagged=True).read_bytes()

    assert int.from_bytes(data[4:8], "little") == len(data) - 8
