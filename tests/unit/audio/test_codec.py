# SPDX-License-Identifier: Apache-2.0
"""Audio files: what is read, what is refused, what is written."""

import io
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from acestep_consumer.audio.codec import Samples, check_encoders, decode, encode
from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.domain.errors import InputUnreadable, RenderFailed

RATE = 48_000


def tone(seconds: float = 1.0, *, rate: int = RATE, hz: float = 440.0, level: float = 0.5) -> NDArray[np.float32]:
    times = np.arange(round(seconds * rate), dtype=np.float32) / rate
    return np.asarray(level * np.sin(2 * np.pi * hz * times), dtype=np.float32)


def stereo(seconds: float = 1.0) -> Samples:
    """Two different tones, so that swapped or mixed channels show."""
    return np.stack((tone(seconds, hz=440), tone(seconds, hz=660, level=0.25)))


def loudest_hz(samples: NDArray[np.float32]) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * RATE / len(samples)


def write_with_av(path: Path, codec: str, samples: Samples, rate: int) -> Path:
    """The suffix names the container, the number of channels the layout."""
    layout = {2: "stereo", 6: "5.1"}[len(samples)]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate = rate
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def test_every_format_of_the_table_can_be_encoded_here() -> None:
    assert check_encoders() == tuple(FORMATS)


def test_a_missing_encoder_takes_only_its_own_formats_away(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        name: replace(found, codec="no-such-codec") for name, found in FORMATS.items() if found.codec == "libopus"
    }
    monkeypatch.setattr("acestep_consumer.audio.codec.FORMATS", {**FORMATS, **broken})
    assert set(FORMATS) - set(check_encoders()) == {"ogg", "opus"}


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_encoded_decodes_to_the_same_sound(name: str, tmp_path: Path) -> None:
    written = encode(stereo(1.5), tmp_path / "song", name, RATE)
    assert (written.path.suffix, written.content_type) == (FORMATS[name].suffix, FORMATS[name].content_type)
    assert (written.sample_rate, written.channels, written.duration_s) == (RATE, 2, 1.5)
    with av.open(str(written.path)) as container:
        stream = container.streams.audio[0]
        assert (stream.rate, stream.channels) == (RATE, 2)
    heard = decode(written.path, sample_rate=RATE, max_seconds=10)
    assert heard.shape[1] / RATE == pytest.approx(1.5, abs=0.06)
    middle = heard[:, RATE // 4 : RATE // 4 + RATE]
    assert [loudest_hz(channel) for channel in middle] == pytest.approx([440, 660], abs=2)
    assert np.abs(middle).max(axis=1) == pytest.approx([0.5, 0.25], abs=0.03)


@pytest.mark.parametrize(("name", "subtype"), [("wav", "PCM_16"), ("wav32", "FLOAT"), ("flac", "PCM_16")])
def test_lossless_formats_keep_every_sample(name: str, subtype: str, tmp_path: Path) -> None:
    samples = stereo()
    written = encode(samples, tmp_path / "song", name, RATE)
    assert soundfile.info(str(written.path)).subtype == subtype
    difference = np.abs(decode(written.path, sample_rate=RATE, max_seconds=2) - samples).max()
    assert difference <= (0 if subtype == "FLOAT" else 1 / 32_768)


def test_opus_is_resampled_to_a_rate_that_opus_has(tmp_path: Path) -> None:
    written = encode(np.stack((tone(rate=44_100), tone(rate=44_100))), tmp_path / "song", "opus", 44_100)
    assert written.sample_rate == 48_000
    heard = decode(written.path, sample_rate=RATE, max_seconds=2)
    assert loudest_hz(heard[0, :RATE]) == pytest.approx(440, abs=2)


def test_a_mono_song_stays_mono(tmp_path: Path) -> None:
    written = encode(tone()[None], tmp_path / "song", "flac", RATE)
    assert written.channels == soundfile.info(str(written.path)).channels == 1


def test_what_is_over_full_scale_is_clipped_and_does_not_wrap_around(tmp_path: Path) -> None:
    written = encode(2 * np.stack((tone(), tone())), tmp_path / "song", "wav", RATE)
    heard = decode(written.path, sample_rate=RATE, max_seconds=2)
    loud = np.abs(tone()) > 0.5 * 0.9
    assert np.sign(heard[0][loud]) == pytest.approx(np.sign(tone()[loud]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_leave_no_file(bad: float, tmp_path: Path) -> None:
    samples = stereo()
    samples[1, 7] = bad
    with pytest.raises(RenderFailed, match="not finite"):
        encode(samples, tmp_path / "song", "mp3", RATE)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RenderFailed, match="the mp3 encoder failed") as failure:
        encode(stereo(), tmp_path / "song", "mp3", 7_001)
    assert str(tmp_path) not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.wav", "pcm_s24le", 44_100),
        ("a.flac", "flac", 96_000),
        ("a.mp3", "libmp3lame", 22_050),
        ("a.ogg", "libopus", 48_000),
        ("a.m4a", "aac", 32_000),
        ("a.webm", "libopus", 24_000),
        ("a.aiff", "pcm_s16be", 11_025),
        ("a.caf", "pcm_f32le", 37_800),
    ],
)
def test_common_formats_are_read_at_any_rate(name: str, codec: str, rate: int, tmp_path: Path) -> None:
    samples = np.stack((tone(2, rate=rate, hz=440), tone(2, rate=rate, hz=660)))
    path = write_with_av(tmp_path / name, codec, samples, rate)
    heard = decode(path, sample_rate=RATE, max_seconds=3)
    assert heard.dtype == np.float32
    assert heard.shape[0] == 2
    assert heard.shape[1] / RATE == pytest.approx(2, abs=0.1)
    assert [loudest_hz(channel) for channel in heard[:, RATE // 2 : 3 * RATE // 2]] == pytest.approx([440, 660], abs=2)


def test_the_suffix_does_not_decide_what_a_file_is(tmp_path: Path) -> None:
    written = encode(stereo(), tmp_path / "song", "flac", RATE)
    renamed = written.path.rename(tmp_path / "song.mp3")
    assert decode(renamed, sample_rate=RATE, max_seconds=2).shape == (2, RATE)


def test_mono_is_doubled_at_full_level(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "mono.wav", tone(), RATE, subtype="FLOAT")
    heard = decode(tmp_path / "mono.wav", sample_rate=RATE, max_seconds=2)
    assert heard[0] == pytest.approx(tone())
    assert np.array_equal(heard[0], heard[1])


def test_six_channels_are_mixed_down_to_two(tmp_path: Path) -> None:
    samples = np.zeros((6, RATE), dtype=np.float32)
    samples[2] = tone()  # the centre is heard on both sides
    path = write_with_av(tmp_path / "film.flac", "flac", samples, RATE)
    heard = decode(path, sample_rate=RATE, max_seconds=2)
    assert heard.shape == (2, RATE)
    assert [loudest_hz(channel) for channel in heard] == pytest.approx([440, 440], abs=2)
    assert np.abs(heard).max() > 0.1


def test_a_song_of_exactly_the_limit_is_read_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    path = encode(stereo(2), tmp_path / "song", "mp3", RATE).path
    assert decode(path, sample_rate=RATE, max_seconds=2).shape[1] / RATE == pytest.approx(2, abs=0.1)
    with pytest.raises(InputUnreadable, match=r"^the source audio is longer than 1\.5 seconds$"):
        decode(path, sample_rate=RATE, max_seconds=1.5, what="the source audio")


def _video_only(path: Path) -> None:
    with av.open(str(path), "w", format="matroska") as out:
        stream = out.add_stream("mjpeg", rate=1)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        frame = av.VideoFrame(16, 16, "yuvj420p")
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def _not_numbers(path: Path) -> None:
    soundfile.write(path, np.full((480, 2), np.nan, dtype=np.float32), RATE, subtype="FLOAT", format="WAV")


def _empty_song(path: Path) -> None:
    soundfile.write(path, np.zeros((0, 2), dtype=np.float32), RATE, format="WAV")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b""), "cannot be read as audio"),
        (lambda path: path.write_bytes(b"once upon a time " * 99), "cannot be read as audio"),
        (lambda path: path.write_bytes(bytes(range(256)) * 400), "cannot be read as audio"),
        (lambda path: path.mkdir(), "cannot be read as audio"),
        (lambda _: None, "is missing"),
        (_video_only, "has no audio track"),
        (_not_numbers, "not numbers"),
        (_empty_song, "contains no samples"),
    ],
    ids=["empty", "text", "bytes", "folder", "missing", "video", "not-a-number", "no-samples"],
)
def test_what_is_no_audio_is_refused_without_naming_a_path(make: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "input"
    assert callable(make)
    make(path)
    with pytest.raises(InputUnreadable, match=said) as refusal:
        decode(path, sample_rate=RATE, max_seconds=10)
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize("cut", [44, 100, 5_000])
def test_a_file_cut_short_is_read_as_far_as_it_goes_or_refused(cut: int, tmp_path: Path) -> None:
    for name in FORMATS:
        path = encode(stereo(), tmp_path / "song", name, RATE).path
        path.write_bytes(path.read_bytes()[:cut])
        try:
            heard = decode(path, sample_rate=RATE, max_seconds=2)
        except InputUnreadable:
            continue
        assert heard.shape[1] <= RATE + RATE // 10


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{secret}'\n",
        "<?xml version='1.0'?><MPD><Period><AdaptationSet><BaseURL>{secret}</BaseURL></AdaptationSet></Period></MPD>",
    ],
    ids=["hls", "concat", "dash"],
)
def test_a_playlist_cannot_reach_another_file(playlist: str, tmp_path: Path) -> None:
    secret = encode(stereo(), tmp_path / "secret", "wav", RATE).path
    (tmp_path / "input").write_text(playlist.format(secret=secret), encoding="utf-8")
    with pytest.raises(InputUnreadable, match="cannot be read as audio"):
        decode(tmp_path / "input", sample_rate=RATE, max_seconds=10)


def ogg_link(rate: int, hz: float, *, number: int) -> bytes:
    """One second of a stereo tone as a complete Ogg stream; ``number`` keeps the links of a chain apart."""
    file = io.BytesIO()
    samples = np.stack([tone(rate=rate, hz=hz)] * 2)
    with av.open(file, "w", format="ogg", options={"serial_offset": str(number)}) as out:
        stream = out.add_stream("vorbis", rate=rate, layout="stereo", options={"strict": "experimental"})
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate = rate
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("rates", [(44_100, 22_050), (22_050, 48_000), (48_000, 48_000), (16_000, 44_100, 32_000)])
def test_a_chained_ogg_file_is_read_whole_whatever_rate_each_link_has(rates: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "radio.ogg"
    links = [ogg_link(rate, 220 * (at + 1), number=10 * at) for at, rate in enumerate(rates)]
    path.write_bytes(b"".join(links))
    samples = decode(path, sample_rate=RATE, max_seconds=10)
    assert samples.shape[1] == pytest.approx(RATE * len(rates), abs=1_500 * len(rates))
    for at in range(len(rates)):
        middle = samples[0, RATE * at + RATE // 4 : RATE * at + 3 * RATE // 4]
        assert loudest_hz(middle) == pytest.approx(220 * (at + 1), abs=3)


def test_the_limit_holds_for_all_links_together(tmp_path: Path) -> None:
    path = tmp_path / "radio.ogg"
    path.write_bytes(b"".join(ogg_link(16_000, 220, number=10 * number) for number in range(3)))
    with pytest.raises(InputUnreadable, match="longer than 2 seconds"):
        decode(path, sample_rate=48_000, max_seconds=2)


@pytest.mark.parametrize("tail", [b"OggS", b"OggS" + bytes(22) + b"\xff", b"no page at all" * 9])
def test_what_follows_the_last_link_of_a_chain_takes_nothing_from_it(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "radio.ogg"
    path.write_bytes(ogg_link(16_000, 220, number=0) + ogg_link(32_000, 220, number=9) + tail)
    assert decode(path, sample_rate=RATE, max_seconds=5).shape[1] == pytest.approx(2 * RATE, abs=RATE / 20)
