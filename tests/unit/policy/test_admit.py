# SPDX-License-Identifier: Apache-2.0
"""Admission: what a request becomes under a card's limits, with every change written down."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.domain.errors import (
    InvalidRequest,
    LimitExceeded,
    LmUnavailable,
    ModelUnavailable,
    TaskUnsupported,
)
from acestep_consumer.domain.job import Job, LoadedModel, Request
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.policy.admit import TURBO_TIMES, Limits, admit
from acestep_consumer.policy.tiers import BUILT_IN
from acestep_schemas.events import LmChoice
from acestep_schemas.request import parse_request

TURBO = LoadedModel("acestep-v15-turbo", Variant.TURBO)
BASE = LoadedModel("acestep-v15-base", Variant.BASE)
LM = LmChoice(model="acestep-5Hz-lm-1.7B", backend="vllm")
FORMATS = frozenset(("mp3", "wav", "flac"))


def limits(vram_gb: float = 24, *models: LoadedModel, lm: LmChoice | None = None) -> Limits:
    return Limits(
        tier=BUILT_IN.tier_of(vram_gb),
        table_version=BUILT_IN.version,
        vram_gb=vram_gb,
        models=models or (TURBO,),
        formats=FORMATS,
        lm=lm,
    )


def admitted(card: Limits, **fields: object) -> Job:
    body, warnings = parse_request({"prompt": "jazz", **fields})
    return admit(Request("task-1", body, warnings), card)


def test_a_request_within_the_limits_passes_unchanged() -> None:
    job = admitted(limits(), audio_duration=60, batch_size=2, bpm=120)
    assert (job.request.audio_duration, job.request.batch_size, job.request.bpm) == (60, 2, 120)
    assert job.policy.adjustments == ()
    assert (job.policy.tier, job.policy.table_version) == ("tier6", "acestep-1.5-2026-02")


@pytest.mark.parametrize(
    ("field", "requested", "applied"),
    [
        ("audio_duration", 600, 480),
        ("batch_size", 20, 8),
    ],
)
def test_a_value_beyond_a_limit_is_clamped_and_reported(field: str, requested: int, applied: int) -> None:
    job = admitted(limits(), **{field: requested})
    assert getattr(job.request, field) == applied
    (change,) = job.policy.adjustments
    assert (change.field, change.requested, change.applied) == (field, requested, applied)
    assert "allows" in change.reason


def test_a_tempo_is_the_requests_own_whatever_the_tier() -> None:
    job = admitted(limits(), bpm=20, on_limit="reject")
    assert (job.request.bpm, job.policy.adjustments) == (20, ())
    assert job.warnings == ("bpm = 20 goes into the prompt as it is: the models were trained on 30 to 300",)


@pytest.mark.parametrize(
    ("fields", "odd"),
    [
        ({"task_type": "extract", "track_name": "vocalss"}, "track_name = vocalss"),
        ({"task_type": "lego", "track_name": "Backing Vocals"}, None),
        ({"stems": True, "task_type": "extract", "track_classes": ["drums", "drum"]}, "track_classes = drum"),
        ({"task_type": "complete", "track_classes": ["bass"], "track_name": "no effect"}, None),
    ],
)
def test_a_track_that_the_models_were_not_trained_on_is_taken_with_a_warning(
    fields: dict[str, object], odd: str | None
) -> None:
    """A misspelt one would cost a song and say nothing."""
    job = admitted(limits(24, BASE), src_audio_path="s3://songs/a.wav", **fields)
    told = [warning.partition(" goes into the prompt as it is: ")[0] for warning in job.warnings]
    assert told == ([odd] if odd else [])


def test_a_turbo_model_takes_eight_steps_and_says_so() -> None:
    job = admitted(limits(), inference_steps=30, on_limit="reject")
    (change,) = job.policy.adjustments
    assert (job.request.inference_steps, change.field, change.requested, change.applied) == (
        8,
        "inference_steps",
        30,
        8,
    )
    assert admitted(limits(24, BASE), inference_steps=30).request.inference_steps == 30


def test_times_of_a_turbo_model_are_the_nearest_that_it_was_trained_on() -> None:
    job = admitted(limits(), timesteps="0.97,0.76,0.18,0.1,0")
    (change,) = job.policy.adjustments
    assert job.request.timesteps == pytest.approx((21 / 22, 10 / 13, 2 / 9, 1 / 8))
    assert type(job.request)(**json.loads(job.request.model_dump_json())) == job.request
    assert (change.field, change.requested) == ("timesteps", [0.97, 0.76, 0.18, 0.1, 0.0])
    assert admitted(limits(), timesteps="1,0.9,0.75,0.5,0.25,0").policy.adjustments == ()
    assert admitted(limits(24, BASE), timesteps="0.97,0.76").request.timesteps == (0.97, 0.76)


def test_a_turbo_model_takes_at_most_twenty_times() -> None:
    many = [1 - step / 25 for step in range(25)]
    taken = admitted(limits(), timesteps=many).request.timesteps
    assert taken is not None
    assert len(taken) == len(TURBO_TIMES) == 20


def test_the_seed_of_a_retake_is_drawn_where_it_counts_and_none_is_given() -> None:
    drawn = admitted(limits(), retake_variance=0.3).request.retake_seed
    assert drawn is not None
    assert drawn >= 0
    assert admitted(limits(), retake_variance=0.3, retake_seed=-1).request.retake_seed == drawn
    assert admitted(limits(), retake_variance=0.3, retake_seed=5).request.retake_seed == 5
    assert admitted(limits()).request.retake_seed is None


def test_on_limit_reject_names_every_limit_that_was_passed() -> None:
    with pytest.raises(LimitExceeded) as caught:
        admitted(limits(), audio_duration=600, batch_size=9, on_limit="reject")
    assert [detail["field"] for detail in caught.value.details] == ["audio_duration", "batch_size"]
    assert "0 to 480 seconds" in str(caught.value)


def test_only_the_language_model_has_a_shortest_song() -> None:
    assert admitted(limits(24), audio_duration=3).request.audio_duration == 3
    (change,) = admitted(limits(24, lm=LM), audio_duration=3).policy.adjustments
    assert (change.field, change.requested, change.applied) == ("audio_duration", 3, 10)


def test_limits_are_tighter_when_the_language_model_is_used() -> None:
    with_lm = admitted(limits(24, lm=LM), thinking=True, batch_size=8)
    without = admitted(limits(24), batch_size=8)
    assert (with_lm.request.batch_size, without.request.batch_size) == (4, 8)
    assert (with_lm.lm, without.lm) == (LM, None)


def test_the_language_model_completes_missing_metadata_only_where_it_is_loaded() -> None:
    complete = {"bpm": 120, "key_scale": "C major", "time_signature": "4", "audio_duration": 60}
    assert admitted(limits(24, lm=LM)).lm == LM
    assert admitted(limits(24, lm=LM), **complete).lm is None
    assert admitted(limits(24)).lm is None


@pytest.mark.parametrize("feature", ["thinking", "sample_mode", "use_format", "full_analysis_only", "analysis_only"])
def test_a_feature_that_needs_the_language_model_fails_without_it(feature: str) -> None:
    with pytest.raises(LmUnavailable, match=feature):
        admitted(limits(), **{feature: True})


@pytest.mark.parametrize("task", ["cover", "cover-nofsq", "repaint", "extract"])
def test_the_language_model_is_skipped_where_the_source_decides(task: str) -> None:
    job = admitted(limits(24, BASE, lm=LM), task_type=task, src_audio_path="s3://b/a.wav", thinking=True)
    assert job.lm is None
    assert any("thinking has no effect" in warning for warning in job.warnings)


def test_the_language_model_is_skipped_for_a_flow_edit() -> None:
    edit = {"flow_edit_morph": True, "src_audio_path": "s3://b/a.wav", "use_format": True}
    job = admitted(limits(24, BASE, lm=LM), **edit)
    assert job.lm is None
    assert "use_format has no effect: the language model is skipped for a flow edit" in job.warnings


def test_no_language_model_is_used_where_it_may_write_no_metadata() -> None:
    assert admitted(limits(24, lm=LM)).lm == LM
    assert admitted(limits(24, lm=LM), use_cot_metas=False).lm is None
    assert admitted(limits(24, lm=LM), use_cot_metas=False, thinking=True).lm == LM


def test_codes_of_source_audio_need_the_source_and_no_language_model() -> None:
    job = admitted(limits(24, lm=LM), extract_codes_only=True, thinking=True, src_audio_path="s3://b/a.wav")
    assert (job.lm, job.analysis) == (None, True)
    with pytest.raises(InvalidRequest, match="extract_codes_only needs source audio"):
        admitted(limits(), extract_codes_only=True)


@pytest.mark.parametrize("analysis", ["analysis_only", "full_analysis_only", "extract_codes_only"])
def test_a_lora_has_nothing_to_do_where_no_song_is_made(analysis: str) -> None:
    asked = {analysis: True, "src_audio_path": "s3://b/a.wav", "lora": "jazz"}
    assert "lora has no effect: an analysis renders no song" in admitted(limits(24, lm=LM), **asked).warnings
    assert admitted(limits(24, lm=LM), lora="jazz").warnings == ()


def test_a_request_for_another_language_model_is_told_which_one_wrote_its_plan() -> None:
    asked = {"thinking": True, "lm_model_path": "ACE-Step/acestep-5Hz-lm-4B", "lm_backend": "pt"}
    job = admitted(limits(24, lm=LM), **asked)
    changes = {change.field: change.applied for change in job.policy.adjustments}
    assert changes == {"lm_model_path": LM.model, "lm_backend": LM.backend}
    same = admitted(limits(24, lm=LM), thinking=True, lm_model_path=LM.model, lm_backend="vllm")
    assert same.policy.adjustments == ()


def test_given_codes_need_no_language_model() -> None:
    job = admitted(limits(), thinking=True, audio_code_string="<|audio_code_1|>" * 50)
    assert job.lm is None
    assert any("audio_code_string" in warning for warning in job.warnings)


def test_a_model_that_is_loaded_is_used() -> None:
    job = admitted(limits(24, TURBO, BASE), model="acestep-v15-base")
    assert (job.model.used, job.model.fallback) == ("acestep-v15-base", False)


def test_a_model_that_is_not_loaded_falls_back_to_the_primary_and_says_so() -> None:
    job = admitted(limits(), model="acestep-v15-base")
    assert (job.model.requested, job.model.used, job.model.fallback) == (BASE.name, TURBO.name, True)
    assert job.request.model == TURBO.name


def test_on_model_unavailable_fail_is_honoured() -> None:
    with pytest.raises(ModelUnavailable, match=r"acestep-v15-base is not loaded here; loaded: acestep-v15-turbo"):
        admitted(limits(), model="acestep-v15-base", on_model_unavailable="fail")


@pytest.mark.parametrize("task", ["extract", "lego", "complete"])
def test_a_task_that_only_base_models_know_is_refused_elsewhere(task: str) -> None:
    with pytest.raises(TaskUnsupported, match="it can do cover, cover-nofsq, repaint, text2music"):
        admitted(limits(), task_type=task, src_audio_path="s3://b/a.wav")
    job = admitted(limits(24, BASE), task_type=task, src_audio_path="s3://b/a.wav")
    assert job.request.task_type == task


def test_a_task_that_another_loaded_model_knows_is_refused_with_its_name() -> None:
    with pytest.raises(TaskUnsupported, match=r"cannot do task_type extract; .*; give model = acestep-v15-base$"):
        admitted(limits(24, TURBO, BASE), task_type="extract", src_audio_path="s3://b/a.wav")


def test_a_fallback_that_cannot_do_the_task_explains_itself() -> None:
    with pytest.raises(TaskUnsupported, match="used instead of acestep-v15-base"):
        admitted(limits(), task_type="lego", src_audio_path="s3://b/a.wav", model="acestep-v15-base")


@pytest.mark.parametrize("task", ["cover", "cover-nofsq"])
def test_a_cover_may_be_of_audio_codes(task: str) -> None:
    assert admitted(limits(), task_type=task, audio_code_string="<|audio_code_1|>").request.task_type == task


@pytest.mark.parametrize("task", ["cover", "cover-nofsq", "repaint", "extract", "lego", "complete"])
def test_a_task_on_audio_without_audio_is_refused_with_the_field(task: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        admitted(limits(24, BASE), task_type=task)
    assert caught.value.problems[0].field == "src_audio_path"
    assert admitted(limits(24, BASE), task_type=task, src_audio_base64="UklGRg==").request.task_type == task


def test_a_flow_edit_without_audio_is_refused_with_the_field() -> None:
    with pytest.raises(InvalidRequest, match="flow_edit_morph needs source audio") as caught:
        admitted(limits(24, BASE), flow_edit_morph=True)
    assert caught.value.problems[0].field == "src_audio_path"
    assert admitted(limits(24, BASE), flow_edit_morph=True, src_audio_path="s3://b/a.wav")


def test_a_format_without_an_encoder_is_refused_before_anything_is_rendered() -> None:
    with pytest.raises(InvalidRequest, match="it has flac, mp3, wav"):
        admitted(limits(), audio_format="aac")


def test_given_seeds_are_kept_and_counted_on() -> None:
    assert admitted(limits(), seed=7, batch_size=3).seeds == (7, 8, 9)
    assert admitted(limits(), seed=[7, 40], batch_size=3).seeds == (7, 40, 41)
    assert admitted(limits(), seed=[7, 40], batch_size=1).seeds == (7,)


def test_a_seed_of_minus_one_is_drawn_for_that_song_only() -> None:
    first, second = admitted(limits(), seed=[-1, 5], batch_size=2).seeds
    assert first >= 0
    assert second == 5


@given(st.text(alphabet="abcXYZ019_-", min_size=1, max_size=128), st.integers(1, 8))
def test_drawn_seeds_depend_on_the_task_id_alone_so_a_redelivery_sings_the_same_song(task_id: str, songs: int) -> None:
    body, _ = parse_request({"prompt": "jazz", "batch_size": songs})
    here, there = (admit(Request(task_id, body), limits(card)).seeds for card in (24, 140))
    assert here == there
    assert len(set(here)) == songs
    assert all(0 <= seed < 2**32 for seed in here)


@given(
    duration=st.none() | st.floats(min_value=0.5, max_value=10_000),
    songs=st.integers(1, 1000),
    vram=st.floats(0, 200),
    lm=st.none() | st.just(LM),
)
def test_whatever_is_asked_the_job_respects_the_tier(
    duration: float | None, songs: int, vram: float, lm: LmChoice | None
) -> None:
    job = admitted(limits(vram, lm=lm), audio_duration=duration, batch_size=songs)
    bound = job.policy.limits
    least = 0 if job.lm is None else 10
    assert job.request.audio_duration is None or least <= job.request.audio_duration <= bound.max_duration_s
    assert 1 <= job.request.batch_size <= bound.max_batch_size
    assert len(job.seeds) == job.request.batch_size
    changed = {change.field for change in job.policy.adjustments}
    asked = {"audio_duration": duration, "batch_size": songs}
    assert changed == {name for name, value in asked.items() if getattr(job.request, name) != value}


def test_the_effective_request_makes_the_same_job_again() -> None:
    first = admitted(limits(), batch_size=3, audio_duration=600, model="nowhere")
    again, warnings = parse_request(first.request.model_dump(mode="json"))
    second = admit(Request("another-task", again, warnings), limits())
    assert second.seeds == first.seeds
    assert second.policy.adjustments == ()
    assert warnings == ()


@pytest.mark.parametrize(
    ("model", "fields", "steps"),
    [
        (TURBO, {"quality": "draft"}, 4),
        (TURBO, {"quality": "final"}, 8),
        (BASE, {"quality": "draft"}, 16),
        (BASE, {"quality": "final"}, 50),
        (TURBO, {"quality": "draft", "inference_steps": 6}, 6),
        (TURBO, {"quality": "draft", "timesteps": [1.0, 0.5]}, 8),
    ],
)
def test_a_draft_and_a_finished_song_have_the_steps_of_the_models_family(
    model: LoadedModel, fields: dict[str, object], steps: int
) -> None:
    job = admitted(limits(24, model), **fields)
    assert job.request.inference_steps == steps
    noted = [(edit.field, edit.value) for edit in job.edits]
    assert noted == ([] if {"inference_steps", "timesteps"} & fields.keys() else [("inference_steps", steps)])


def test_the_event_says_why_a_draft_of_a_base_model_has_more_steps() -> None:
    (of_base,), (of_turbo,) = (admitted(limits(24, model), quality="draft").edits for model in (BASE, TURBO))
    assert of_base.because == (
        "quality = draft, with a base model: after the 4 of a turbo model its songs are little but noise"
    )
    assert of_turbo.because == "quality = draft, with a turbo model"


def test_a_draft_that_is_planned_with_a_larger_language_model_says_so() -> None:
    asked = {"quality": "draft", "thinking": True}
    (warning,) = admitted(limits(lm=LM), **asked).warnings
    assert warning.startswith("quality = draft: planned with acestep-5Hz-lm-1.7B, the only language model here")
    small = LmChoice(model="acestep-5Hz-lm-0.6B", backend="vllm")
    assert admitted(limits(lm=small), **asked).warnings == ()


def test_stems_have_one_seed_and_are_as_many_as_there_are_tracks_on_any_card() -> None:
    job = admitted(
        limits(4, BASE), task_type="extract", src_audio_path="s3://b/k", stems=True, batch_size=12, track_classes="a"
    )
    assert (job.request.batch_size, len(set(job.seeds)), len(job.seeds)) == (12, 1, 12)
    assert job.policy.adjustments == ()


class TestCandidates:
    """The best of several: as many songs are made as candidates, within the tier's limit of a batch."""

    def test_each_has_a_seed(self) -> None:
        job = admitted(limits(), candidates=4, keep=2, seed=[7, 9])
        assert job.seeds == (7, 9, 10, 11)
        assert (job.request.candidates, job.request.keep, job.request.batch_size) == (4, 2, 4)
        assert job.policy.adjustments == ()

    def test_too_many_are_clamped_and_reported(self) -> None:
        job = admitted(limits(12), candidates=6, keep=5, thinking=False)
        assert (job.request.candidates, job.request.keep, len(job.seeds)) == (4, 4, 4)
        assert [(each.field, each.requested, each.applied, each.reason) for each in job.policy.adjustments] == [
            ("candidates", 6, 4, "this worker allows 1 to 4 songs a request"),
            ("keep", 5, 4, "this worker makes at most 4 candidates"),
        ]

    def test_too_many_are_rejected_if_the_request_says_so(self) -> None:
        with pytest.raises(LimitExceeded, match="candidates = 6: this worker allows 1 to 4"):
            admitted(limits(12), candidates=6, on_limit="reject")

    def test_a_redelivery_makes_the_same_ones(self) -> None:
        assert admitted(limits(), candidates=3).seeds == admitted(limits(), candidates=3).seeds

    @pytest.mark.parametrize("task", [{"task_type": "repaint"}, {"task_type": "extract", "track_name": "vocals"}])
    def test_they_are_made_for_every_task_that_makes_songs(self, task: dict[str, str]) -> None:
        job = admitted(limits(24, BASE), candidates=2, src_audio_path="s3://in/a.wav", **task)
        assert (len(job.seeds), job.warnings) == (2, ())

    def test_an_analysis_has_none(self) -> None:
        job = admitted(limits(lm=LM), candidates=2, analysis_only=True)
        assert job.warnings == ("candidates has no effect: an analysis makes no song",)
        assert (job.request.candidates, job.request.batch_size, len(job.seeds)) == (None, 1, 1)
