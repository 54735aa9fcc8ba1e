# SPDX-License-Identifier: Apache-2.0
"""Edits in a musician's words: the fields that they stand for, and those that contradict each other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from acestep_consumer.domain.edits import (
    NOT_TAKEN_OVER,
    TAKEN_OVER_BY_REPAINTS,
    FoundSong,
    check,
    concerns,
    resolve,
)
from acestep_consumer.domain.errors import InvalidRequest
from acestep_consumer.domain.job import StoredObject, Track
from acestep_consumer.domain.tasks import TRACK_CLASSES
from acestep_schemas.events import Candidate, FileObject, LyricLine, Metas, SongFiles
from acestep_schemas.request import GenerationRequest, parse_request
from tests.support.jobs import make_job, make_manifest

LYRICS = "[Verse]\nDown by the river\nI saw you\n\n[Chorus]\nSing, sing!\n\n[Verse]\nUp on the hill\nsing sing"
TIMES = (
    ("[Verse]", 0.0, 1.0),
    ("Down by the river", 1.0, 3.0),
    ("I saw you", 3.2, 5.0),
    ("[Chorus]", 5.0, 6.0),
    ("Sing, sing!", 6.0, 8.0),
    ("[Verse]", 8.0, 9.0),
    ("Up on the hill", 9.0, 11.0),
    ("sing sing", 11.5, 13.0),
)


def request(**fields: Any) -> GenerationRequest:
    return parse_request(fields)[0]


def song(
    *,
    timed: bool = True,
    times: tuple[tuple[str, float, float], ...] = TIMES,
    score: float | None = None,
    index: int = 0,
    **fields: Any,
) -> FoundSong:
    """A song of 20 seconds, made from ``fields``, that the language model has described."""
    job = make_job(task_id="first", audio_duration=20, batch_size=2, **{"lyrics": LYRICS, **fields})
    done = make_manifest(job, tuple(map(stored, range(2))))
    lyrics = tuple(LyricLine(text=text, start_s=start, end_s=end) for text, start, end in times if timed)
    audios = tuple(audio.model_copy(update={"lyrics": lyrics, "lyric_score": score}) for audio in done.audios)
    words = fields.get("lyrics", LYRICS)
    metas = Metas(bpm=96, caption="slow jazz with brushes", keyscale="A minor", language="en", lyrics=words)
    changes = {"audios": audios, "metas": metas, "audio_codes": ((1, 2), (3, 4))}
    return FoundSong(done.model_copy(update=changes), index)


def stored(number: int) -> StoredObject:
    track = Track(
        path=Path(f"{number}.mp3"),
        seed=40 + number,
        format="mp3",
        content_type="audio/mpeg",
        sample_rate=48_000,
        channels=2,
        duration_s=20.0,
    )
    return StoredObject(track=track, uri=f"s3://acestep/jobs/first/{number}.mp3", url=None, bytes=1, sha256="0")


def noted(asked: GenerationRequest, found: FoundSong | None) -> dict[str, Any]:
    check(asked)
    return {edit.field: edit.value for edit in resolve(asked, found).edits}


def test_a_plain_request_has_nothing_to_resolve() -> None:
    assert not concerns(request(prompt="jazz", seed=3))
    assert not concerns(request(prompt="jazz", quality="draft"))


def test_an_extension_to_the_right_is_a_repaint_past_the_end_in_the_words_of_the_song() -> None:
    asked = request(source_task_id="first", extend_right_s=30, prompt="faster")
    values = noted(asked, song())
    assert (values["task_type"], values["repainting_start"], values["repainting_end"]) == ("repaint", 19.0, 50.0)
    assert (values["lyrics"], values["bpm"], values["key_scale"]) == (LYRICS, 96, "A minor")
    assert "prompt" not in values
    made = resolve(asked, song()).request
    assert (made.prompt, made.extend_right_s, made.task_type) == ("faster", None, "repaint")


@pytest.mark.parametrize(
    "edit",
    [
        {"extend_right_s": 30},
        {"task_type": "repaint"},
        {"replace_lines": {"I saw you": "I see you"}},
        {"variation": 0.2},
    ],
)
def test_times_loudness_format_and_loras_of_the_song_are_taken_over_and_said(edit: dict[str, Any]) -> None:
    asked_first: dict[str, Any] = {"timestamps": True, "loudness_lufs": -14, "true_peak_db": -2, "audio_format": "flac"}
    asked_first |= {"lora": {"path": "jazz", "scale": 0.5}, "loras": ["vinyl"], "sampler_mode": "heun"}
    values = noted(request(source_task_id="first", **edit), song(**asked_first))
    assert {name: values[name] for name in asked_first} == asked_first | {
        "lora": {"path": "jazz", "scale": 0.5, "alpha": None},
        "loras": [{"path": "vinyl", "scale": 1.0, "alpha": None}],
    }
    because = {edit.because for edit in resolve(request(source_task_id="first", **edit), song(**asked_first)).edits}
    assert "of song 0 of first" in because


@pytest.mark.parametrize("edit", [{"extend_right_s": 30}, {"variation": 0.2}])
def test_what_a_request_gives_counts_in_place_of_what_its_song_had(edit: dict[str, Any]) -> None:
    own = {"timestamps": False, "loudness_lufs": 0, "audio_format": "mp3", "loras": [], "inference_steps": 8}
    before = song(timestamps=True, loudness_lufs=-14, audio_format="flac", lora="jazz", timesteps=[1, 0.5])
    made = resolve(request(source_task_id="first", **edit, **own), before).request
    assert (made.timestamps, made.loudness_lufs, made.audio_format) == (False, None, "mp3")
    assert (made.all_loras, made.inference_steps, made.timesteps) == ((), 8, None)


def test_an_extension_with_another_model_takes_over_nothing_that_belongs_to_the_model_of_its_song() -> None:
    before = song(lora="jazz", inference_steps=6, shift=2.0, timestamps=True)
    used = before.manifest.model.used
    made = resolve(request(source_task_id="first", extend_right_s=5, model="another"), before).request
    assert (made.model, made.lora, made.inference_steps, made.shift, made.timestamps) == ("another", None, 8, 3.0, True)
    same = resolve(request(source_task_id="first", extend_right_s=5, model=used), before).request
    assert (same.inference_steps, same.shift) == (6, 2.0)


def test_quality_sets_the_steps_of_an_extension_in_place_of_those_of_its_song() -> None:
    before = song(quality="draft", inference_steps=4)
    assert resolve(request(source_task_id="first", extend_right_s=5), before).request.inference_steps == 4
    finished = resolve(request(source_task_id="first", extend_right_s=5, quality="final"), before).request
    assert "inference_steps" not in finished.model_fields_set


def test_what_is_taken_over_are_fields_that_a_song_which_is_made_again_takes_over_too() -> None:
    assert GenerationRequest.model_fields.keys() > set(TAKEN_OVER_BY_REPAINTS)
    assert NOT_TAKEN_OVER.isdisjoint(TAKEN_OVER_BY_REPAINTS)


@pytest.mark.parametrize(
    ("edit", "track"),
    [
        ({"extend_right_s": 5}, "bass"),
        ({"task_type": "repaint"}, "bass"),
        ({"variation": 0.2}, "bass"),
        ({"quality": "final"}, "bass"),
        ({"task_type": "cover"}, None),
    ],
)
def test_a_repaint_or_a_variation_of_a_stem_is_of_the_track_that_the_stem_is_of(
    edit: dict[str, Any], track: str | None
) -> None:
    asked: dict[str, Any] = {"stems": True, "task_type": "extract", "src_audio_path": "s3://songs/a.wav"}
    found = song(index=1, **asked)
    (first, second) = found.manifest.audios
    audios = (first.model_copy(update={"track": "drums"}), second.model_copy(update={"track": "bass"}))
    stem = FoundSong(found.manifest.model_copy(update={"audios": audios}), 1)
    made = resolve(request(source_task_id="first", source_index=1, **edit), stem)
    job = replace(make_job(), request=made.request, source=made.source)
    assert job.track_of(0) == track


@pytest.mark.parametrize(
    ("edit", "window", "fade_out"),
    [
        ({"extend_right_s": 10}, (15.0, 30.0), 5.0),
        ({"extend_right_s": 10, "fade_out_duration": 0}, (15.0, 30.0), 0.0),
        ({"extend_right_s": 10, "fade_out_duration": 8}, (15.0, 30.0), 8.0),
        ({"task_type": "repaint", "repainting_start": 15}, (15.0, None), 5.0),
        ({"task_type": "repaint", "repainting_start": 12, "repainting_end": 20}, (12.0, 20.0), 5.0),
        ({"task_type": "repaint", "repainting_start": 3, "repainting_end": 6}, (3.0, 6.0), 0.0),
        ({"extend_left_s": 10}, (-10.0, 1.0), 0.0),
    ],
)
def test_the_fade_out_of_a_song_is_taken_over_where_all_of_it_is_made_anew(
    edit: dict[str, Any], window: tuple[float, float | None], fade_out: float
) -> None:
    made = resolve(request(source_task_id="first", **edit), song(fade_out_duration=5))
    assert (made.request.repainting_start, made.request.repainting_end) == window
    assert (made.request.fade_in_duration, made.request.fade_out_duration) == (0.0, fade_out)
    assert not made.warnings


def with_latents(found: FoundSong) -> FoundSong:
    uri = "s3://acestep/jobs/first/0.latents.safetensors"
    files = SongFiles(latents=FileObject(uri=uri, content_type="", bytes=1, sha256="0"))
    audios = tuple(audio.model_copy(update={"files": files}) for audio in found.manifest.audios)
    return FoundSong(found.manifest.model_copy(update={"audios": audios}), found.index)


@pytest.mark.parametrize(
    "edit",
    [
        {"task_type": "repaint", "repainting_start": 8, "repainting_end": 9},
        {"task_type": "repaint", "repainting_start": 16, "repainting_end": 18},
        {"task_type": "lego", "repainting_start": 8, "repainting_end": 9},
        {"extend_right_s": 10},
        {"extend_left_s": 10},
        {"replace_lines": {"I saw you": "I see you"}},
    ],
)
def test_a_song_that_is_decoded_throughout_from_latents_fades_as_the_song_they_are_of(edit: dict[str, Any]) -> None:
    """The latents are those before the fades, and an aggressive repaint keeps no samples of the file."""
    asked: dict[str, Any] = {"source_task_id": "first", "repaint_mode": "aggressive", **edit}
    found = resolve(request(**asked), with_latents(song(fade_in_duration=3, fade_out_duration=5)))
    assert (found.request.fade_in_duration, found.request.fade_out_duration) == (3.0, 5.0)
    assert not found.warnings
    because = {edit.because for edit in found.edits if edit.field.startswith("fade_")}
    assert because == {"of song 0 of first: the new song is made from the latents, which do not fade"}
    own = resolve(request(**asked, fade_in_duration=0), with_latents(song(fade_in_duration=3)))
    assert own.request.fade_in_duration == 0.0


@pytest.mark.parametrize(
    "kept", [{}, {"repaint_strength": 1}, {"repaint_mode": "aggressive", "repaint_wav_crossfade_sec": 0}]
)
def test_a_song_that_keeps_samples_of_the_file_does_not_fade_twice(kept: dict[str, Any]) -> None:
    window: dict[str, Any] = {"task_type": "repaint", "repainting_start": 8, "repainting_end": 9}
    asked = request(source_task_id="first", **window, **kept)
    found = resolve(asked, with_latents(song(fade_in_duration=3, fade_out_duration=5)))
    assert (found.request.fade_in_duration, found.request.fade_out_duration) == (0.0, 0.0)


def test_a_track_that_is_added_to_a_part_fades_where_the_song_does() -> None:
    window: dict[str, Any] = {"task_type": "lego", "repainting_start": 12}
    found = resolve(request(source_task_id="first", **window), song(fade_out_duration=5))
    assert (found.request.fade_out_duration, found.request.prompt) == (5.0, "")
    (warning,) = resolve(request(source_task_id="first", **window), song(fade_out_duration=10)).warnings
    assert warning.startswith("the song fades in its last 10 s, of which 8 s are made anew")


def test_an_extension_says_that_it_makes_the_fade_of_the_song_anew() -> None:
    right = resolve(request(source_task_id="first", extend_right_s=10), song(fade_out_duration=5)).edits
    because = {edit.field: edit.because for edit in right}
    assert because["repainting_start"] == "extend_right_s = 10, the song has 20 s, and 5 s of it fade out"
    assert because["fade_out_duration"] == "of song 0 of first: all of it is made anew"
    left = resolve(request(source_task_id="first", extend_left_s=10), song(fade_in_duration=3, fade_out_duration=5))
    assert (left.request.repainting_end, left.request.fade_in_duration, left.request.fade_out_duration) == (3, 3, 0)
    assert "extend_left_s = 10, and 3 s of the song fade in" in {edit.because for edit in left.edits}


@pytest.mark.parametrize("fade", [7.3333, 8 * 60 / 130, 4 * 60 / 77])
def test_an_extension_takes_over_a_fade_of_any_length(fade: float) -> None:
    made = resolve(request(source_task_id="first", extend_right_s=10), song(fade_out_duration=fade))
    assert made.request.fade_out_duration == pytest.approx(fade)
    assert not made.warnings


def test_an_extension_of_a_song_that_fades_throughout_keeps_the_song() -> None:
    right = resolve(request(source_task_id="first", extend_right_s=10), song(fade_out_duration=99))
    assert right.request.repainting_start > 0
    assert "the song fades in its last 20 s" in " ".join(right.warnings)
    left = resolve(request(source_task_id="first", extend_left_s=10), song(fade_in_duration=99))
    assert left.request.repainting_end is not None
    assert left.request.repainting_end < 20
    assert "the song fades in its first 20 s" in " ".join(left.warnings)


def test_a_repaint_of_the_whole_song_fades_as_the_song_does() -> None:
    faded = song(fade_in_duration=3, fade_out_duration=99)
    for window in ({}, {"repainting_start": 8, "repainting_end": 8}):
        made = resolve(request(source_task_id="first", task_type="repaint", **window), faded)
        assert (made.request.fade_in_duration, made.request.fade_out_duration) == (3.0, 20.0)
        assert not made.warnings


def test_a_repaint_of_a_piece_of_a_fade_says_that_the_piece_does_not_fade() -> None:
    faded = song(fade_out_duration=5)
    window: dict[str, Any] = {"task_type": "repaint", "repainting_start": 16, "repainting_end": 18}
    (warning,) = resolve(request(source_task_id="first", **window), faded).warnings
    assert warning.startswith("the song fades in its last 5 s, of which 2 s are made anew: these do not fade.")
    assert not resolve(request(source_task_id="first", **window, fade_out_duration=1), faded).warnings


def test_a_repaint_says_that_a_rescaling_of_the_latents_is_not_that_of_the_new_part() -> None:
    rescaled = song(latent_rescale=1.5, latent_shift=0.1)
    edit: dict[str, Any] = {"source_task_id": "first", "extend_right_s": 10}
    found = resolve(request(**edit), rescaled)
    assert [warning.partition(" is not taken over")[0] for warning in found.warnings] == [
        "latent_rescale = 1.5 of song 0 of first",
        "latent_shift = 0.1 of song 0 of first",
    ]
    assert found.request.latent_rescale == 1
    assert not resolve(request(**edit, latent_rescale=2, latent_shift=0), rescaled).warnings


def test_an_extension_to_the_left_is_whole_frames_long() -> None:
    made = resolve(request(source_task_id="first", extend_left_s=10.01), song()).request
    assert (made.repainting_start, made.repainting_end) == (-10.0, 1.0)


def test_a_variation_takes_over_the_request_its_seed_and_its_codes() -> None:
    asked = request(source_task_id="first", source_index=1, variation=0.3, batch_size=3, audio_format="flac")
    before: dict[str, Any] = {"inference_steps": 6, "shift": 2.0, "thinking": True, "audio_format": "wav"}
    made = resolve(asked, song(index=1, **before)).request
    assert (made.seed, made.batch_size, made.audio_format) == ((41, 41, 41), 3, "flac")
    assert (made.prompt, made.inference_steps, made.shift, made.thinking) == ("slow jazz with brushes", 6, 2.0, False)
    assert made.audio_code_string == "<|audio_code_3|><|audio_code_4|>"
    assert (made.retake_variance, made.variation, made.source_task_id) == (0.3, None, None)
    (source,) = (edit for edit in resolve(asked, song(index=1)).edits if edit.field == "source_task_id")
    assert (source.value, source.because) == (None, "that song has no source")


def test_a_final_song_takes_over_everything_but_the_steps() -> None:
    asked = request(source_task_id="first", quality="final")
    draft = song(quality="draft", inference_steps=4, shift=2.0, retake_variance=0.2, retake_seed=9, index=1)
    made = resolve(asked, draft).request
    assert (made.seed, made.shift, made.retake_variance, made.retake_seed) == ((41,), 2.0, 0.2, 10)
    assert "inference_steps" not in made.model_fields_set
    assert made.quality == "final"


def test_a_final_with_a_task_of_its_own_works_on_the_song() -> None:
    found = resolve(request(source_task_id="first", quality="final", task_type="cover", prompt="funk"), song())
    assert (found.request.task_type, found.request.prompt, found.request.seed) == ("cover", "funk", ())
    assert found.source is not None
    assert found.source.uri == "s3://acestep/jobs/first/0.mp3"


def test_stems_are_an_extract_of_each_track_or_of_those_that_are_named() -> None:
    assert noted(request(source_task_id="first", stems=True), song()) == {
        "task_type": "extract",
        "track_classes": list(TRACK_CLASSES),
        "batch_size": 12,
    }
    named = noted(request(src_audio_path="s3://songs/a.wav", stems=True, track_classes="drums,bass,drums"), None)
    assert (named["track_classes"], named["batch_size"]) == (["drums", "bass"], 2)


def test_a_line_is_found_whatever_its_case_and_punctuation_and_sung_anew_where_it_was() -> None:
    asked = request(source_task_id="first", replace_lines={"down, by the RIVER": "Down by the sea"})
    values = noted(asked, song())
    # Half of the silence to the next line is the margin; before the first line there is all of it.
    assert (values["repainting_start"], values["repainting_end"]) == (0.6, 3.1)
    assert values["lyrics"] == LYRICS.replace("Down by the river", "Down by the sea")


def test_a_section_is_replaced_by_its_number() -> None:
    asked = request(source_task_id="first", replace_lines={"section": "verse 2", "lyrics": "Over the sea\nsing low"})
    values = noted(asked, song())
    assert (values["repainting_start"], values["repainting_end"]) == (8.6, 13.4)
    assert values["lyrics"].endswith("[Verse]\nOver the sea\nsing low")
    assert values["lyrics"].startswith("[Verse]\nDown by the river\nI saw you\n\n[Chorus]")


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        ({"I saw you": "x", "i saw you!": "y"}, "names 'I saw you' twice: case and punctuation do not count"),
        ({"sing sing": "hum hum"}, "is sung 2 times, at 6.0 s, 11.5 s: name its section"),
        ({"no such line": "x"}, "the song does not sing 'no such line'; it sings 'Down by the river', 'I saw you'"),
        (
            {"section": "bridge", "lyrics": "x"},
            "have no section 'bridge'; their sections are 'verse', 'chorus', 'verse'",
        ),
        ({"section": "verse", "lyrics": "x"}, "have 2 sections 'verse', number them"),
        ({"section": "verse 3", "lyrics": "x"}, "have no section 'verse 3'"),
    ],
)
def test_lines_that_are_not_clear_are_refused_with_what_there_is(lines: dict[str, str], rule: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        resolve(request(source_task_id="first", replace_lines=lines), song())
    assert rule in str(error.value)


def test_a_line_that_the_song_leaves_out_is_refused_and_not_made_a_repaint_of_the_whole_song() -> None:
    """Alignment gives such a line no time of its own."""
    skipped = tuple((text, 5.0, 5.0) if text == "I saw you" else (text, start, end) for text, start, end in TIMES)
    skipped = (skipped[0], ("Down by the river", 1.0, 5.0), *skipped[2:4], ("Sing, sing!", 5.0, 8.0), *skipped[5:])
    asked = request(source_task_id="first", replace_lines={"I saw you": "I see you"})
    with pytest.raises(InvalidRequest, match=r"sung from 5\.00 to 5\.00 s, which is too short to be sung anew"):
        resolve(asked, song(times=skipped))


def sung(*times: tuple[float, float]) -> FoundSong:
    """A song of lines ``line 1`` and so on, and when alignment says that they are sung; 20 seconds long."""
    lines = [f"line {number}" for number in range(1, len(times) + 1)]
    timed = tuple((line, *at) for line, at in zip(lines, times, strict=True))
    return song(times=timed, lyrics="[Verse]\n" + "\n".join(lines), score=0.63)


def replacing(*numbers: int) -> GenerationRequest:
    lines = {f"line {number}": f"another {number}" for number in numbers}
    return request(source_task_id="first", replace_lines=lines)


SKIPPED = (0.0, 0.0)


@pytest.mark.parametrize(
    ("times", "numbers", "beside"),
    [
        # A collapsed alignment: one line has the time of all.
        ((SKIPPED,) * 5 + ((0.0, 19.92),), (6,), "'line 1', 'line 2', 'line 3', 'line 4', 'line 5'"),
        (((0.0, 19.92), *((19.92, 19.92),) * 2), (1,), "'line 2', 'line 3'"),
        ((SKIPPED, (0.0, 19.92)), (2,), "'line 1'"),
        # Of a part: the lines before it are somewhere in its time, and the one after it has its own.
        ((SKIPPED, SKIPPED, (0.0, 14.0), (14.0, 20.0)), (3,), "'line 1', 'line 2'"),
        # On both sides, some frames for each.
        (((0.0, 4.0), (4.0, 4.4), (4.4, 15.0), (15.0, 15.6), (15.6, 20.0)), (3,), "'line 2', 'line 4'"),
        # Naming some of them is not enough.
        ((SKIPPED,) * 5 + ((0.0, 19.92),), (4, 6), "'line 1', 'line 2', 'line 3'"),
    ],
)
def test_a_line_that_has_the_time_of_its_neighbours_is_refused_and_not_made_a_repaint_of_them(
    times: tuple[tuple[float, float], ...], numbers: tuple[int, ...], beside: str
) -> None:
    with pytest.raises(InvalidRequest) as error:
        resolve(replacing(*numbers), sung(*times))
    assert f"for which no other time was found: {beside}. They would be made anew with it" in str(error.value)
    assert "repaint a part by repainting_start and repainting_end" in str(error.value)


def test_a_section_that_has_the_time_of_the_others_is_refused() -> None:
    times = (*((text, 0.0, 0.0) for text, *_ in TIMES[:-1]), ("sing sing", 0.0, 19.92))
    asked = request(source_task_id="first", replace_lines={"section": "verse 2", "lyrics": "Over the sea"})
    with pytest.raises(InvalidRequest, match="'Down by the river', 'I saw you', 'Sing, sing!'"):
        resolve(asked, song(times=times))


def test_all_lines_of_a_collapsed_alignment_may_be_named_to_make_them_anew() -> None:
    found = sung(*(SKIPPED,) * 5, (0.0, 19.92))
    resolution = resolve(replacing(1, 2, 3, 4, 5, 6), found)
    assert (resolution.request.repainting_start, resolution.request.repainting_end) == (0.0, 20.0)
    assert resolution.warnings == ()


@pytest.mark.parametrize(
    ("times", "number", "window"),
    [
        # A song of one line, and of two.
        (((0.0, 19.92),), 1, (0.0, 20.0)),
        (((0.0, 9.0), (9.4, 20.0)), 2, (9.2, 20.0)),
        # A line is left out, and those beside it have the time that a line takes.
        (((0.0, 5.0), (5.0, 5.0), (5.0, 11.0), (11.0, 20.0)), 3, (5.0, 11.0)),
        # Two that are sung at the same time, as alignment has it, are still two.
        (((0.0, 6.0), (6.0, 6.0), (6.0, 6.0), (6.0, 13.0), (13.0, 20.0)), 4, (6.0, 13.0)),
    ],
)
def test_a_line_beside_which_nothing_is_lost_is_replaced_without_a_warning(
    times: tuple[tuple[float, float], ...], number: int, window: tuple[float, float]
) -> None:
    resolution = resolve(replacing(number), sung(*times))
    assert (resolution.request.repainting_start, resolution.request.repainting_end) == window
    assert resolution.warnings == ()


def test_a_section_that_is_most_of_the_song_is_replaced_without_a_warning() -> None:
    words = "[Verse]\na\nb\nc\nd\n[Outro]\nbye"
    times = (("a", 0.0, 5.0), ("b", 5.0, 9.0), ("c", 9.0, 9.0), ("d", 9.0, 16.0), ("bye", 16.2, 20.0))
    asked = request(source_task_id="first", replace_lines={"section": "verse", "lyrics": "one\ntwo"})
    resolution = resolve(asked, song(times=times, lyrics=words))
    assert (resolution.request.repainting_start, resolution.request.repainting_end) == (0.0, 16.1)
    assert resolution.warnings == ()


def test_lines_that_are_repeated_at_one_time_are_told_apart() -> None:
    words = "[Chorus]\nhey\nhey\n[Chorus]\nhey\nhey\n[Verse]\nbye"
    times = (("hey", 0.0, 5.0), ("hey", 5.0, 5.0), ("hey", 5.0, 5.0), ("hey", 5.0, 10.0), ("bye", 10.0, 20.0))
    asked = request(source_task_id="first", replace_lines={"section": "chorus 2", "lyrics": "ho\nho"})
    resolution = resolve(asked, song(times=times, lyrics=words))
    assert (resolution.request.repainting_start, resolution.request.repainting_end) == (5.0, 10.0)
    assert resolution.request.lyrics == "[Chorus]\nhey\nhey\n[Chorus]\nho\nho\n[Verse]\nbye"


def test_a_line_that_is_much_longer_than_the_others_is_replaced_with_a_warning_that_names_the_score() -> None:
    """Alignment gives each second to a line: a break, or what follows the last line, is in the line before it."""
    resolution = resolve(replacing(4), sung((0.0, 2.0), (2.0, 4.0), (4.0, 6.0), (6.0, 19.92)))
    (warning,) = resolution.warnings
    assert warning.startswith("replace_lines: 'line 4': sung from 6.00 to 19.92 s, 2.8 times as long as a line of this")
    assert "(its lyric_score is 0.63). A part without singing is made anew with it" in warning


def test_lines_that_are_far_from_each_other_are_replaced_with_a_warning_about_those_between_them() -> None:
    resolution = resolve(replacing(1, 4), sung((0.0, 4.0), (4.0, 8.0), (8.0, 12.0), (12.0, 16.0), (16.0, 20.0)))
    (warning,) = resolution.warnings
    assert warning.startswith("replace_lines: 2 more lines between those that are replaced are made anew, too: to keep")


def test_each_field_has_one_edit_the_last_one() -> None:
    asked = request(source_task_id="first", replace_lines={"I saw you": "I see you"})
    fields = [edit.field for edit in resolve(asked, song()).edits]
    assert sorted(fields) == sorted(set(fields))


def test_lines_of_a_song_without_times_are_refused_with_what_to_do() -> None:
    asked = request(source_task_id="first", replace_lines={"I saw you": "I see you"})
    with pytest.raises(InvalidRequest, match="make it with timestamps = true"):
        resolve(asked, song(timed=False))


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        (
            {"extend_left_s": 5, "extend_right_s": 5},
            "extend_left_s is given, too, and a repaint has one part: extend the song on one side, then the result on",
        ),
        ({"variation": 0.5, "stems": True}, "variation is given, too"),
        ({"variation": 0.5, "retake_variance": 0.2}, "variation sets it: give one of the two"),
        ({"variation": 0.5, "task_type": "cover"}, "variation takes the task over from its song: leave task_type out"),
        ({"extend_right_s": 5, "repainting_start": 3}, "extend_right_s sets it: give one of the two"),
        ({"extend_right_s": 5, "task_type": "cover"}, "extend_right_s is a repaint: leave task_type out"),
        ({"replace_lines": {"a": "b"}, "lyrics": "c"}, "replace_lines changes the lyrics of the song"),
        ({"stems": True, "track_name": "drums"}, "stems sets it: give one of the two"),
        ({}, "nothing says what to make of it: give task_type (cover, repaint, extract, lego, complete)"),
        ({"extend_left_s": 0, "extend_right_s": "0"}, "and extend_left_s = 0 adds nothing and extend_right_s = 0 adds"),
    ],
)
def test_edits_that_contradict_each_other_are_refused(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check(request(source_task_id="first", **fields))
    assert rule in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("variation", 0.5), ("replace_lines", {"a": "b"})])
def test_an_edit_that_needs_an_earlier_song_says_so(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match="needs source_task_id: the id of the task that made the song"):
        check(request(**{field: value, "src_audio_path": "s3://songs/a.wav"}))


def test_an_extension_of_other_audio_is_a_repaint_whose_window_the_renderer_sets() -> None:
    made = resolve(request(src_audio_path="s3://songs/a.wav", extend_right_s=5), None).request
    assert (made.task_type, made.extend_right_s, made.repainting_end) == ("repaint", 5.0, None)
    with pytest.raises(InvalidRequest, match="needs source_task_id, or source audio"):
        check(request(extend_right_s=5))


def test_a_song_from_audio_in_its_request_cannot_be_made_again() -> None:
    with pytest.raises(InvalidRequest, match="was made from audio in the request itself, which is not kept"):
        resolve(request(source_task_id="first", variation=0.5), song(task_type="cover"))


def test_a_cover_from_an_url_is_made_again_from_it_with_its_seed_whatever_the_client_sends_by_default() -> None:
    asked = request(source_task_id="first", variation=0.5, src_audio_path="s3://b/other", seed=-1, use_random_seed=True)
    made = resolve(asked, song(task_type="cover", src_audio_path="s3://songs/a.wav")).request
    assert (made.task_type, made.src_audio_path, made.source_task_id) == ("cover", "s3://songs/a.wav", None)
    assert (made.seed, made.use_random_seed, made.batch_size) == ((40,), False, 1)


def test_a_song_of_which_others_were_not_kept_has_the_noise_of_its_own_place() -> None:
    found = song(quality="draft", retake_variance=0.2, retake_seed=9)
    # Candidates of a variation have one seed.
    made = tuple(Candidate(seed=40, score=0.5, kept=index is not None, index=index) for index in (None, 1, 0))
    chosen = FoundSong(found.manifest.model_copy(update={"candidates": made}), found.index)
    assert (chosen.index, chosen.place) == (0, 2)
    assert resolve(request(source_task_id="first", quality="final"), chosen).request.retake_seed == 11


def test_a_stem_that_is_made_again_has_the_noise_that_all_stems_share() -> None:
    asked: dict[str, Any] = {"stems": True, "task_type": "extract", "src_audio_path": "s3://songs/a.wav"}
    found = song(index=1, retake_variance=0.2, retake_seed=9, **asked)
    assert resolve(request(source_task_id="first", quality="final"), found).request.retake_seed == 9
