# SPDX-License-Identifier: Apache-2.0
"""Values that break a rule: what is used in their place, what the warning says, and what is refused all the same."""

import pytest

from acestep_schemas.lenient import NOT_REPLACED
from acestep_schemas.request import GenerationRequest, RequestInvalid, parse_request


def lenient(**body: object) -> tuple[GenerationRequest, str]:
    request, (warning,) = parse_request(body)
    with pytest.raises(RequestInvalid):
        parse_request(body, strict=True)
    with pytest.raises(RequestInvalid):
        parse_request({**body, "strict": True})
    return request, warning


@pytest.mark.parametrize(
    ("field", "written", "used", "said"),
    [
        ("bpm", "fast", None, "'bpm' = fast: must be a number; the default is used"),
        ("bpm", 92.5, None, "'bpm' = 92.5: must be a whole number; the default is used"),
        ("bpm", True, 1, "'bpm' = true: must be a number; 1 is used"),
        ("audio_duration", "auto", None, "'audio_duration' = auto: must be a number; the default is used"),
        ("inference_steps", "x", 8, "'inference_steps' = x: must be a number; the default is used"),
        ("inference_steps", 0, 1, "'inference_steps' = 0: must be at least 1; 1 is used"),
        ("inference_steps", 5_000, 1_000, "'inference_steps' = 5000: must be at most 1,000; 1000 is used"),
        ("batch_size", -2, 1, "'batch_size' = -2: must be at least 1; 1 is used"),
        ("keep", 0, 1, "'keep' = 0: must be at least 1; 1 is used"),
        ("candidates", -1, None, "'candidates' = -1: must be at least 0; 0 is used"),
        ("loudness_lufs", 14, None, "'loudness_lufs' = 14: must be at most -5; the default is used"),
        ("loudness_lufs", -90, None, "'loudness_lufs' = -90: must be at least -70; the default is used"),
        ("shift", 0, 1.0, "'shift' = 0: must be at least 0.001; 1.0 is used"),
        ("shift", 99, 10.0, "'shift' = 99: must be at most 10; 10.0 is used"),
        ("seed", -5, (), "'seed' = -5: must be at least -1; the default is used"),
        ("audio_format", "m4a", "flac", "; flac is used"),
        ("lm_top_p", 0, 1.0, "'lm_top_p' = 0: must be above 0; 1.0 is used"),
        ("lm_top_k", -1, 0, "'lm_top_k' = -1: must be at least 0; 0 is used"),
        ("guidance_scale", 1_000, 100.0, "'guidance_scale' = 1000: must be at most 100; 100.0 is used"),
        ("audio_cover_strength", 1.5, 1.0, "; 1.0 is used"),
        ("cfg_interval_start", -1, 0.0, "; 0.0 is used"),
        ("timesteps", "0.5,0.9", None, "'timesteps' = 0.5,0.9: must fall strictly"),
        ("infer_method", "euler", "ode", "must be 'ode' or 'sde'; the default is used"),
        ("prompt", "x" * 9_000, "x" * 8_192, "must have at most 8,192 characters; its beginning is used"),
        (
            "prompt",
            ["soft", "jazz"],
            "['soft', 'jazz']",
            "'prompt' = ['soft', 'jazz']: must be text; ['soft', 'jazz'] is used",
        ),
        ("lyrics", True, "True", "'lyrics' = true: must be text; True is used"),
        ("prompt", "jazz \ud83c", "jazz ?", "must be valid Unicode, without lone surrogates; jazz ? is used"),
        ("bpm", float("nan"), None, "'bpm' = nan: must be a whole number; the default is used"),
        (
            "vocal_language",
            "Japanese",
            "Japanese",
            "must be a language code, such as en; it goes into the prompt as it is",
        ),
        ("bpm", "\uff11\uff12\uff10", 120, "must be a number; 120 is used"),
        ("bpm", "1_20", 120, "'bpm' = 1_20: must be a number; 120 is used"),
        ("bpm", "1__20", None, "'bpm' = 1__20: must be a number; the default is used"),
        ("seed", "\u0661, 2", (1, 2), "; 1, 2 is used"),
        ("thinking", [], False, "must be true or false; the default is used"),
        ("key_scale", "D dorian", "D dorian", "; it goes into the prompt as it is"),
        ("time_signature", "5/4", "5/4", "; it goes into the prompt as it is"),
    ],
)
def test_what_ace_step_would_use_is_used_and_said(field: str, written: object, used: object, said: str) -> None:
    request, warning = lenient(**{field: written})
    assert getattr(request, field) == used
    assert said in warning


@pytest.mark.parametrize(
    ("start", "end", "used"),
    [
        ("cfg_interval_start", "cfg_interval_end", "no step is guided"),
        ("flow_edit_n_min", "flow_edit_n_max", "no step is edited"),
    ],
)
def test_a_reversed_interval_is_used_as_it_is(start: str, end: str, used: str) -> None:
    request, warning = lenient(**{start: 0.8, end: 0.2})
    assert (getattr(request, start), getattr(request, end)) == (0.8, 0.2)
    assert warning == f"'{end}' = 0.2: {end} must not be below {start}; {used}"


def test_a_window_that_ends_before_it_begins_is_the_whole_song() -> None:
    source = {"task_type": "repaint", "src_audio_path": "s3://songs/a.flac"}
    request, warning = lenient(**source, repainting_start=5, repainting_end="5")
    assert request.repainting_end == 5
    said = "'repainting_end' = 5: repainting_end must be after repainting_start; the whole song is made anew"
    assert warning == said
    assert parse_request({"prompt": "x", "repainting_start": 5, "repainting_end": 5})[1] == ()


def test_a_replacement_that_is_too_long_is_cut() -> None:
    request, warnings = parse_request({"key_scale": ["C major"] * 99})
    assert request.key_scale == str(["C major"] * 99)[:128]
    assert warnings[-1].endswith("; its beginning is used")


@pytest.mark.parametrize("name", ["param_obj", "metas"])
def test_a_nested_object_that_cannot_be_read_is_ignored(name: str) -> None:
    request, warning = lenient(prompt="x", **{name: "bpm=90"})
    assert (request.prompt, request.bpm) == ("x", None)
    assert warning.startswith(f"'{name}' = bpm=90: must be an object, or JSON text of one")
    assert warning.endswith("; it is ignored")


def test_an_alias_is_named_in_the_warning() -> None:
    _, warning = lenient(duration="long")
    assert warning == "'audio_duration' = long: must be a number (written as duration); the default is used"


@pytest.mark.parametrize(
    ("field", "written"),
    [
        ("task_type", "dance"),
        ("task_id", "a b"),
        ("src_audio_path", "/etc/passwd"),
        ("reference_audio_path", "a.wav"),
        ("lora", "../x"),
        ("repaint_mode", "soft"),
        ("repaint_strength", 2),
        ("chunk_mask_mode", "none"),
        ("lm_backend", "custom"),
        ("on_limit", "ignore"),
        ("queue_deadline_s", 10**9),
        ("audio_code_string", "la la la"),
        ("extend_right_s", -5),
        ("extend_left_s", "-0.1"),
        ("variation", -1),
    ],
)
def test_what_no_reading_can_mend_is_refused_in_lenient_requests_too(field: str, written: object) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_request({field: written, "bpm": "fast"})
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize("zero", [0, "0", 0.0, "0.0"])
@pytest.mark.parametrize(
    "field",
    ["candidates", "extend_left_s", "extend_right_s", "loudness_lufs", "queue_deadline_s", "audio_duration", "bpm"],
)
def test_zero_switches_a_field_off_without_a_warning_in_strict_requests_too(field: str, zero: object) -> None:
    for strict in (False, True):
        request, warnings = parse_request({"prompt": "x", field: zero}, strict=strict)
        assert (getattr(request, field), warnings) == (None, ())


@pytest.mark.parametrize(
    "field", ["candidates", "extend_left_s", "extend_right_s", "loudness_lufs", "queue_deadline_s"]
)
def test_the_schema_says_what_zero_means(field: str) -> None:
    assert "0 or none: " in str(GenerationRequest.model_fields[field].description)


def test_no_variation_at_all_is_the_same_song_and_not_none() -> None:
    assert parse_request({"source_task_id": "first", "variation": 0}, strict=True)[0].variation == 0


def test_only_known_fields_are_listed() -> None:
    assert {*GenerationRequest.model_fields, "loras"} >= NOT_REPLACED


def test_defaults_of_the_operator_are_below_the_body_and_above_our_own() -> None:
    defaults = {"batch_size": 2, "audio_format": "flac"}
    request, warnings = parse_request({"batch_size": 3}, defaults=defaults)
    assert (request.batch_size, request.audio_format, warnings) == (3, "flac", ())
    assert parse_request({"batch_size": ""}, defaults=defaults)[0].batch_size == 2
