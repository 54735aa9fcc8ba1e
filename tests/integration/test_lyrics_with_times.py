# SPDX-License-Identifier: Apache-2.0
"""Lyrics with times, tags and loudness out of the renderer, with a tiny model."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutagen
import numpy as np
import pytest
import torch

from acestep_consumer.audio import codec
from acestep_consumer.audio.codec import decode
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import Sources, Track
from acestep_consumer.engine.renderer import encode_songs, prepare, startup
from acestep_consumer.engine.renderer.batch_request import RequestCallbacks
from acestep_consumer.engine.renderer.lyrics import lyric_alignment
from acestep_consumer.engine.renderer.lyrics.alignment_pass import alignment_noise
from acestep_consumer.engine.renderer.lyrics.lyric_alignment import existing_heads, heads_of
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.render_resources import RenderResources
from acestep_consumer.engine.testing.tiny_checkpoint import write
from tests.integration.test_renderer import BASE, CODES, TURBO, recording, render_message, rendered

LYRICS = "[Verse]\nla la la\nshine on me\n\n[Chorus]\n夜が来る\n"
TEXTS = ["[Verse]", "la la la", "shine on me", "[Chorus]", "夜が来る"]


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> RenderResources:
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder)
    settings = EngineSettings(checkpoint_dir=folder, config_path2=BASE, device="cpu", pack_wait_ms=20)
    return RenderResources(startup.open_runtime(settings).scheduler)


def track_of(resources: RenderResources, folder: Path, **request: Any) -> Track:
    fields = {"lyrics": LYRICS, "audio_duration": 6, "timestamps": True}
    return rendered(resources, render_message(folder, **{**fields, **request})).tracks[0]


def require_times(track: Track, seconds: float = 6) -> None:
    assert [line.text for line in track.lyrics] == TEXTS
    times = [time for line in track.lyrics for time in (line.start_s, line.end_s)]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= seconds
    for line in track.lyrics:
        assert "".join(token.text for token in line.tokens).strip() == line.text
        assert all(line.start_s <= token.start_s <= token.end_s <= line.end_s for token in line.tokens)
    assert track.lyric_score is not None
    assert 0 <= track.lyric_score <= 1


def test_a_song_that_asks_has_lines_with_times_and_two_files(resources: RenderResources, tmp_path: Path) -> None:
    track = track_of(resources, tmp_path)

    require_times(track)
    assert {file.kind: file.path.name for file in track.side_files} == {"lrc": "0.lrc", "vtt": "0.vtt"}
    assert (tmp_path / "0.lrc").read_text(encoding="utf-8").startswith("[00:00.00][Verse]\n")
    assert (tmp_path / "0.vtt").read_text(encoding="utf-8").startswith("WEBVTT\n")


def test_a_song_that_does_not_ask_has_none_and_sounds_the_same(resources: RenderResources, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    plain, timed = track_of(resources, tmp_path, timestamps=False), track_of(resources, tmp_path / "a")

    assert (plain.lyrics, plain.lyric_score, plain.side_files) == ((), None, ())
    first, second = (decode(track.path, sample_rate=48_000, max_seconds=10) for track in (plain, timed))
    assert np.array_equal(first, second)


def test_a_song_that_does_not_ask_costs_the_device_and_the_encoders_nothing(
    resources: RenderResources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        pytest.fail("nothing asked for times")

    for place, name in ((ModelRunner, "align"), (encode_songs, "align"), (prepare, "alignment_noise")):
        monkeypatch.setattr(place, name, fail)
    monkeypatch.setattr(RenderResources, "warper", fail)
    track = track_of(resources, tmp_path, timestamps=False)

    assert track.lyrics == ()


def test_the_noise_of_an_alignment_is_drawn_before_the_device_needs_it(resources: RenderResources) -> None:
    asked = arguments(1, align=True, seconds=7.2)
    before = alignment_noise.cache_info().misses
    resources.scheduler._runners[TURBO].preparer.prepare(asked)
    prepared = alignment_noise.cache_info().misses
    matrices_of(resources, [asked])

    assert (prepared, alignment_noise.cache_info().misses) == (before + 1, before + 1)


@pytest.mark.parametrize(
    "request_fields",
    [
        {"model": BASE, "guidance_scale": 7, "inference_steps": 4},
        {"audio_code_string": CODES, "audio_duration": None},
        {"audio_code_string": CODES, "audio_duration": None, "audio_cover_strength": 0.5},
        {"infer_method": "sde"},
        {"latent_rescale": 0.9, "latent_shift": 0.1},
        {"audio_duration": 3},
        {"inference_steps": 1},
    ],
    ids=["guided", "codes", "switch to text", "sde", "rescaled", "short", "one step"],
)
def test_any_kind_of_song_has_times(request_fields: dict[str, Any], resources: RenderResources, tmp_path: Path) -> None:
    track = track_of(resources, tmp_path, **request_fields)

    require_times(track, track.duration_s)


@pytest.mark.parametrize("task", ["cover", "repaint"])
def test_a_song_from_a_source_has_times(task: str, resources: RenderResources, tmp_path: Path) -> None:
    source = recording(tmp_path / "source", seconds=6, hz=220)
    window = {"repainting_start": 2, "repainting_end": 4} if task == "repaint" else {}
    fields: dict[str, Any] = {"task_type": task, "lyrics": LYRICS, "timestamps": True, **window}

    (track,) = rendered(resources, render_message(tmp_path, sources=Sources(source=source), **fields)).tracks

    require_times(track)


@pytest.mark.parametrize("lyrics", ["", "[Instrumental]", "[Intro]\n[Outro]\n"])
def test_a_song_without_lyrics_says_so(lyrics: str, resources: RenderResources, tmp_path: Path) -> None:
    made = rendered(resources, render_message(tmp_path, lyrics=lyrics, audio_duration=6, timestamps=True))

    assert (made.tracks[0].lyrics, made.tracks[0].lyric_score, made.tracks[0].side_files) == ((), None, ())
    assert "timestamps had no effect: the song has no lyrics" in made.warnings


def arguments(seed: int, *, align: bool, seconds: float = 6, lyrics: str = LYRICS) -> PipelineArguments:
    return PipelineArguments(prompt="jazz", lyrics=lyrics, audio_duration=seconds, seeds=(seed,), align=align)


def matrices_of(resources: RenderResources, asked: Sequence[PipelineArguments]) -> list[torch.Tensor | None]:
    """Return each song's matrices, all songs in one pack."""
    submitted = [resources.scheduler.submit(TURBO, each, None, RequestCallbacks()) for each in asked]
    found = [futures.audio[0].result().matrices for futures in submitted]
    return [None if each is None else each.wait() for each in found]


def test_songs_of_one_pack_have_the_matrices_that_they_have_alone(resources: RenderResources) -> None:
    asked = [
        arguments(1, align=True),
        arguments(2, align=False),
        arguments(3, align=True, seconds=9.4, lyrics="oh oh\n" * 9),
        arguments(4, align=True),
    ]

    together = matrices_of(resources, asked)

    assert together[1] is None
    for each, found in zip(asked, together, strict=True):
        (alone,) = matrices_of(resources, [each])
        if found is not None and alone is not None:
            assert found.shape == alone.shape
            torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)
    assert not torch.equal(*(each for each in (together[0], together[3]) if each is not None))


def test_the_attention_to_the_lyrics_is_freed_before_the_song_is_encoded(
    resources: RenderResources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned, encode = lyric_alignment.align, codec.encode
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def noted_align(matrices: torch.Tensor, *rest: Any) -> Any:
        kept.append(weakref.ref(matrices))
        return aligned(matrices, *rest)

    def noted_encode(*song: Any) -> Any:
        alive.append(sum(each() is not None for each in kept))
        return encode(*song)

    monkeypatch.setattr(encode_songs, "align", noted_align)
    monkeypatch.setattr(codec, "encode", noted_encode)
    rendered(resources, render_message(tmp_path, lyrics=LYRICS, audio_duration=6, timestamps=True, seeds=(1, 2)))

    assert (len(kept), alive) == (2, [0, 0])


def test_lyrics_that_cannot_be_aligned_do_not_cost_the_song(
    resources: RenderResources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ModelRunner, "align", fail)
    made = rendered(resources, render_message(tmp_path, lyrics=LYRICS, audio_duration=6, timestamps=True))

    assert made.tracks[0].lyrics == ()
    assert "the lyrics of a song could not be aligned: out of memory" in made.warnings


def test_a_model_without_such_heads_says_so(
    resources: RenderResources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.scheduler._runners[TURBO].parts, "alignment_heads", {})
    made = rendered(resources, render_message(tmp_path, lyrics=LYRICS, audio_duration=6, timestamps=True))

    assert made.tracks[0].lyrics == ()
    assert (
        f"the lyrics have no times and no score: {TURBO} has none of the heads that follow the singing" in made.warnings
    )


def test_heads_are_those_of_the_config_else_ace_steps_own() -> None:
    full = {"num_hidden_layers": 24, "num_attention_heads": 16}
    tiny = {"num_hidden_layers": 4, "num_attention_heads": 8}
    named = heads_of({"lyric_alignment_layers_config": {"1": [2], "30": [0]}})

    assert heads_of({}) is None
    assert existing_heads(None, full) == {2: (6,), 3: (10, 11), 4: (3,), 5: (8, 9), 6: (8,)}
    assert existing_heads(None, tiny) == {2: (6,)}
    assert existing_heads(named, full) == {1: (2,)}
    with pytest.raises(ValueError, match="no table of layers and heads"):
        heads_of({"lyric_alignment_layers_config": [3]})


def test_a_file_has_tags_unless_the_operator_wants_none(resources: RenderResources, tmp_path: Path) -> None:
    track = track_of(resources, tmp_path, audio_format="mp3", prompt="slow jazz")
    found: Any = mutagen.File(track.path).tags

    assert found["TIT2"].text == ["slow jazz"]
    assert found["TXXX:TASK_ID"].text == ["job"]
    assert found.getall("USLT")[0].text == LYRICS.strip()
    assert [text for text, _ in found.getall("SYLT")[0].text] == TEXTS
    bare = track_of(replace(resources, tags=False), tmp_path, audio_format="mp3")
    assert mutagen.File(bare.path).tags is None


def test_the_event_says_how_loud_a_song_became(resources: RenderResources, tmp_path: Path) -> None:
    quiet = rendered(resources, render_message(tmp_path, audio_duration=6, loudness_lufs=-40))
    loud = rendered(resources, render_message(tmp_path, audio_duration=6, loudness_lufs=-5, true_peak_db=-6))

    assert quiet.tracks[0].loudness is not None
    assert quiet.tracks[0].loudness.lufs == pytest.approx(-40, abs=0.01)
    assert quiet.adjustments == ()
    held = loud.tracks[0].loudness
    assert held is not None
    assert held.lufs is not None
    assert held.true_peak_db == pytest.approx(-6, abs=0.01)
    (note,) = loud.adjustments
    assert (note.field, note.requested, note.applied) == ("loudness_lufs", -5, round(held.lufs, 2))
    assert note.reason == "song 0: louder, its true peak would be above -6 dB"
