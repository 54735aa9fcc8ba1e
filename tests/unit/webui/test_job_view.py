# SPDX-License-Identifier: Apache-2.0
"""How each event updates the view of a job."""

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from acestep_consumer.webui.job_view import JobView, SongView, content_type_of, file_name, updated, with_request
from acestep_schemas import examples
from acestep_schemas.events import (
    Audio,
    Candidate,
    Edit,
    JobCompleted,
    JobEvent,
    JobProgress,
    JobStarted,
    ParentSong,
    Unfinished,
)
from acestep_schemas.request import GenerationRequest

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
BLANK = JobView(task_id=examples.TASK_ID, number=1, since=NOW, changed=NOW - timedelta(days=365), received=NOW)


def after(*events: JobEvent, view: JobView = BLANK) -> JobView:
    for event in events:
        view = updated(view, event, NOW)
    return view


def at(event: Any, moment: datetime) -> Any:
    return event.model_copy(update={"time": moment})


def test_a_started_job_shows_worker_model_adjustments_and_the_seconds_to_expect() -> None:
    data = examples.started().data.model_copy(update={"expected_s": 8.5})
    view = after(JobStarted.of(data))
    assert (view.state, view.worker_id, view.model) == ("running", data.worker_id, data.model)
    assert (view.adjustments, view.tier) == (data.policy.adjustments, data.policy.tier)
    assert view.remaining_s == 8.5


def test_progress_shows_stage_share_and_what_remains_also_when_the_start_was_missed() -> None:
    data = examples.progress().data.model_copy(update={"remaining_s": 3.0})
    view = after(JobProgress.of(data, attempt=1, worker_id="w"))
    assert (view.state, view.progress, view.stage, view.remaining_s) == ("running", data.progress, data.stage, 3.0)


def test_a_completed_job_shows_songs_words_metas_and_warnings() -> None:
    data = examples.completed().data.model_copy(update={"warnings": ("one tile at a time",)})
    view = after(examples.started(), JobCompleted.of(data))
    assert (view.state, view.progress, view.remaining_s) == ("completed", 1.0, None)
    assert (view.metas, view.warnings, view.audios) == (data.metas, ("one tile at a time",), data.audios)
    assert view.request is not None
    assert view.request["prompt"] == data.request.prompt


def test_what_a_browser_gets_names_no_object_and_holds_no_codes() -> None:
    sent = after(examples.completed()).model_dump_json()
    assert "s3://" not in sent
    assert "audio_codes" not in sent
    assert "audios" not in sent


def test_a_seed_survives_a_browser_that_counts_in_floating_point() -> None:
    event = examples.completed()
    audio = event.data.audios[0].model_copy(update={"seed": 2**63 - 1})
    view = after(JobCompleted.of(event.data.model_copy(update={"audios": (audio,)})))
    assert view.songs[0].seed == "9223372036854775807"
    shown = with_request(BLANK, GenerationRequest(seed=(2**63 - 1, 2), retake_seed=2**62 + 1)).request
    assert shown == {"seed": "9223372036854775807, 2", "retake_seed": "4611686018427387905"}


def test_an_unfinished_job_keeps_what_was_known_and_shows_why() -> None:
    for status in ("failed", "rejected", "cancelled", "expired"):
        event = examples.unfinished(status)
        assert isinstance(event.data, Unfinished)
        view = after(examples.started(), event)
        assert view.state == status
        assert view.error == event.data.error
        assert view.model == examples.started().data.model


def test_late_news_change_nothing_after_the_end() -> None:
    ended = after(at(examples.unfinished("failed"), NOW))
    assert after(examples.progress(), view=ended) is ended
    assert after(at(examples.started(), NOW - timedelta(seconds=1)), view=ended) is ended


def test_a_start_after_the_end_is_the_same_id_submitted_again() -> None:
    ended = after(at(examples.unfinished("cancelled"), NOW))
    again = after(at(examples.started(), NOW + timedelta(seconds=1)), view=ended)
    assert (again.state, again.error, again.progress) == ("running", None, 0.0)


def test_another_attempt_begins_at_nothing() -> None:
    second = JobStarted.of(examples.started().data.model_copy(update={"attempt": 2}))
    view = after(examples.started(), examples.progress(), second)
    assert (view.attempt, view.progress, view.stage) == (2, 0.0, "")


def test_a_file_name_has_no_room_for_a_header_or_a_path() -> None:
    audio = examples.completed().data.audios[0].model_copy(update={"uri": 's3://b/j/../x"\r\nSet-Cookie: ä.mp3'})
    assert file_name("job", audio) == "job-x___Set-Cookie___.mp3"


def test_what_differs_from_the_defaults_is_shown_of_a_request_and_its_codes_are_counted() -> None:
    request = GenerationRequest(
        task_id="t", prompt="jazz", audio_code_string="<|audio_code_1|><|audio_code_20|>", thinking=True
    )
    view = with_request(BLANK, request)
    assert (view.request, view.codes) == ({"prompt": "jazz", "thinking": True}, 2)
    assert "audio_code_" not in view.model_dump_json()
    assert view.job_request is not None
    assert view.job_request.request is request


def test_a_request_from_the_page_keeps_its_codes_which_the_event_of_its_start_does_not_have() -> None:
    asked = GenerationRequest(prompt="jazz", audio_code_string="<|audio_code_1|>")
    view = after(JobStarted.of(examples.started().data), view=with_request(BLANK, asked))
    assert (view.state, view.codes, view.asked) == ("running", 1, asked)


def test_a_song_is_sent_as_what_its_format_is_whatever_its_event_says() -> None:
    audio = examples.completed().data.audios[0]
    lied = audio.model_copy(update={"content_type": "text/html"})
    assert content_type_of(lied) == "audio/flac"
    assert content_type_of(lied.model_copy(update={"format": "html"})) == "application/octet-stream"


def test_the_words_of_a_job_of_somebody_else_are_known_as_soon_as_a_worker_begins_it() -> None:
    view = after(JobStarted.of(examples.started().data))
    assert view.request is not None
    assert view.request["prompt"] == examples.REQUEST["prompt"]
    assert after(JobStarted.of(examples.started().data.model_copy(update={"request": None}))).request is None


def song_of(**audio: object) -> SongView:
    made = examples.completed().data
    changed = Audio.model_validate(made.audios[0].model_dump() | audio)
    (song,) = after(JobCompleted.of(made.model_copy(update={"audios": (changed,)}))).songs
    return song


def test_lyrics_with_times_scores_and_peaks_reach_the_page() -> None:
    token = {"text": "Rain", "start_s": 0.5, "end_s": 0.9}
    line = {"text": "Rain falls", "start_s": 0.5, "end_s": 2.0, "tokens": [token]}
    song = song_of(lyrics=[line], lyric_score=0.875, peaks="AP8=", track="vocals")
    assert song.model_dump()["lyrics"] == ({**line, "tokens": (token,)},)
    assert (song.lyric_score, song.peaks, song.track) == (0.875, "AP8=", "vocals")
    plain = song_of()
    assert (plain.lyrics, plain.lyric_score, plain.peaks, plain.track) == ((), None, "", "")


@pytest.mark.parametrize(
    "lyrics",
    [
        [{"text": "never", "start_s": float("nan"), "end_s": 1}],
        [{"text": "before", "start_s": -1, "end_s": 1}],
        [{"text": "x" * 1_001, "start_s": 0, "end_s": 1}],
        [{"text": "many", "start_s": 0, "end_s": 1}] * 2_001,
    ],
)
def test_lyrics_beyond_all_bounds_are_left_out(lyrics: object) -> None:
    assert song_of(lyrics=lyrics).lyrics == ()


@pytest.mark.parametrize("peaks", ["<img>", "AP8", base64.b64encode(bytes(402)).decode()])
def test_peaks_that_are_not_base64_or_too_long_are_left_out(peaks: str) -> None:
    assert song_of(peaks=peaks).peaks == ""


def test_candidates_are_shown_with_scores_and_what_was_measured() -> None:
    kept = Candidate(seed=2**62, score=0.9, kept=True, index=0, measures={"silence": 1.0})
    dropped = Candidate(seed=8, score=0.2, kept=False)
    made = examples.completed().data
    view = after(JobCompleted.of(made.model_copy(update={"candidates": (kept, dropped)})))
    first, second = view.candidates
    assert (first.seed, first.score, first.index, first.measures) == (str(2**62), 0.9, 0, {"silence": 1.0})
    assert (second.kept, second.index) == (False, None)
    assert after(JobCompleted.of(made.model_copy(update={"candidates": (kept,) * 65}))).candidates == ()


def test_the_family_of_a_song_and_what_its_edits_came_to_are_shown() -> None:
    parent = ParentSong(task_id="one", index=2, field="variation")
    edit = Edit(field="bpm", value=90, because="of song 2 of one")
    changes = {"parents": (parent,), "edits": (edit,)}
    view = after(JobCompleted.of(examples.completed().data.model_copy(update=changes)))
    assert (view.parents, view.edits) == ((parent,), (edit,))
