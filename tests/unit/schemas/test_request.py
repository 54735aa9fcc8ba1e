# SPDX-License-Identifier: Apache-2.0
"""The reading of request bodies: aliases, nesting, coercions, warnings, and errors that name everything wrong."""

import json
import re
import time
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acestep_schemas import coerce
from acestep_schemas.aliases import ALIASES, METAS, NO_COUNTERPART
from acestep_schemas.request import (
    EMBEDDED_AUDIO,
    TASK_ID_PATTERN,
    FieldProblem,
    GenerationRequest,
    LoraChoice,
    RequestInvalid,
    parse_request,
    read_task_id,
    request_json_schema,
)

# A busy machine is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A value for each field, as a sender may write it, that differs from the default.
WRITTEN: dict[str, object] = {
    "task_id": "song-1",
    "task_type": "Cover",
    "model": " acestep-v15-base ",
    "lora": {"path": "jazz", "scale": 0.8, "alpha": 16.0},
    "loras": ("blues", {"path": "rock", "scale": "-1", "alpha": None}),
    "on_limit": "reject",
    "queue_deadline_s": "60",
    "on_model_unavailable": "FAIL",
    "strict": "yes",
    "prompt": "slow blues",
    "lyrics": "[verse]\nla",
    "instrumental": "no",
    "vocal_language": "pt-BR",
    "bpm": "92",
    "key_scale": "F# minor",
    "time_signature": "6",
    "audio_duration": "95.5",
    "batch_size": 2.0,
    "candidates": "2",
    "keep": "1",
    "seed": "7, 8",
    "use_random_seed": "no",
    "inference_steps": "27",
    "guidance_scale": 5,
    "shift": "1.5",
    "timesteps": "0.9,0.5,0",
    "infer_method": "SDE",
    "sampler_mode": "HEUN",
    "velocity_norm_threshold": "1.5",
    "velocity_ema_factor": ".1",
    "use_adg": 1,
    "cfg_interval_start": "0.1",
    "cfg_interval_end": 0.9,
    "dcw_enabled": "no",
    "dcw_mode": "High",
    "dcw_scaler": "0.1",
    "dcw_high_scaler": 0.03,
    "dcw_wavelet": "DB4",
    "retake_seed": "5",
    "retake_variance": "0.3",
    "source_index": "2",
    "extend_left_s": "10",
    "extend_right_s": 30,
    "replace_lines": '{"la la": "do do"}',
    "variation": "0.4",
    "stems": "yes",
    "quality": "Draft",
    "noise": "Device",
    "latent_rescale": "0.9",
    "latent_shift": "-0.1",
    "use_tiled_decode": "off",
    "audio_format": "FLAC",
    "mp3_bitrate": "320K",
    "mp3_sample_rate": "44100",
    "fade_in_duration": "1.5",
    "fade_out_duration": 2,
    "enable_normalization": "no",
    "normalization_db": "-3",
    "loudness_lufs": "-14",
    "true_peak_db": "-1.5",
    "timestamps": "true",
    "src_audio_path": "s3://in/a.wav",
    "reference_audio_path": "https://example.org/b.mp3",
    "repainting_start": 3,
    "repainting_end": "9.5",
    "repaint_mode": "Aggressive",
    "repaint_strength": "0.2",
    "repaint_latent_crossfade_frames": "10",
    "repaint_wav_crossfade_sec": 0,
    "chunk_mask_mode": "EXPLICIT",
    "audio_cover_strength": ".5",
    "no_fsq": "off",
    "cover_noise_strength": "0.2",
    "flow_edit_morph": "yes",
    "flow_edit_source_caption": "quiet piano",
    "flow_edit_source_lyrics": "[verse]\nhm",
    "flow_edit_n_min": "0.1",
    "flow_edit_n_max": "0.9",
    "flow_edit_n_avg": "2",
    "audio_code_string": "<|audio_code_1|>",
    "instruction": "Do this:",
    "global_caption": "a jazz trio",
    "track_name": "drums",
    "track_classes": ["drums", "bass"],
    "thinking": "yes",
    "sample_mode": "on",
    "sample_query": "something sad",
    "use_format": "y",
    "analysis_only": True,
    "full_analysis_only": "true",
    "extract_codes_only": "1",
    "use_cot_metas": "n",
    "use_cot_caption": "false",
    "use_cot_language": False,
    "is_format_caption": 1,
    "constrained_decoding": 0,
    "constrained_decoding_debug": "1",
    "allow_lm_batch": "n",
    "lm_model_path": "acestep-5Hz-lm-0.6B",
    "lm_backend": "PT",
    "lm_temperature": "1",
    "lm_cfg_scale": 1,
    "lm_top_k": "50",
    "lm_top_p": 0.5,
    "lm_repetition_penalty": 1.25,
    "lm_negative_prompt": "noise",
}
SPELLINGS = [(field, name) for field in WRITTEN for name in (field, *ALIASES.get(field, ()))]
BODIES = st.fixed_dictionaries({}, optional={field: st.just(value) for field, value in WRITTEN.items()})


def parsed(**body: object) -> GenerationRequest:
    request, warnings = parse_request(body)
    assert warnings == ()
    return request


def problem(**body: object) -> FieldProblem:
    with pytest.raises(RequestInvalid) as caught:
        parse_request(body, strict=True)
    (only,) = caught.value.problems
    return only


def warned(**body: object) -> str:
    (only,) = parse_request(body)[1]
    return only


def nested(source: str, body: dict[str, object]) -> dict[str, object]:
    """The body as it is, or inside an object, or as JSON text inside an object."""
    if source == "body":
        return body
    name, _, form = source.partition(" ")
    return {name: json.dumps(body) if form else body}


def test_every_field_has_a_sample_here() -> None:
    assert set(WRITTEN) | set(EMBEDDED_AUDIO) | {"source_task_id"} == set(GenerationRequest.model_fields)


@pytest.mark.parametrize("half", [{"section": "verse 2"}, {"lyrics": "over the sea"}])
def test_a_section_without_lyrics_is_no_line_called_section(half: dict[str, str]) -> None:
    with pytest.raises(RequestInvalid, match="names a section and no lyrics, or lyrics and no section"):
        parsed(source_task_id="first", replace_lines=half)


def test_a_song_of_an_earlier_task_outranks_source_audio() -> None:
    body = {"task_type": "cover", "sourceTaskId": " song-1 ", "src_audio_path": "s3://songs/a.wav"}
    request, warnings = parse_request(body)
    assert (request.source_task_id, request.src_audio_path, request.has_source) == ("song-1", None, True)
    assert warnings == (
        "'src_audio_path' = s3://songs/a.wav: source_task_id is given, too, and outranks it; it is ignored",
    )
    with pytest.raises(RequestInvalid, match="source_task_id is given, too"):
        parse_request(body, strict=True)


def test_what_the_operator_has_set_was_not_given_by_the_producer() -> None:
    request, _ = parse_request({"prompt": "jazz"}, defaults={"audio_format": "flac", "batch_size": 2})
    assert (request.audio_format, request.batch_size) == ("flac", 2)
    assert request.model_fields_set == {"prompt"}


def test_an_empty_body_is_ace_steps_defaults() -> None:
    request = parsed()
    assert (request.inference_steps, request.guidance_scale, request.shift) == (8, 7.0, 3.0)
    assert (request.vocal_language, request.audio_format, request.task_type) == ("en", "mp3", "text2music")
    assert (request.infer_method, request.audio_cover_strength, request.batch_size) == ("ode", 1.0, 1)
    assert (request.seed, request.use_random_seed, request.thinking) == ((), True, False)
    assert (request.lm_temperature, request.lm_cfg_scale, request.lm_top_p, request.lm_top_k) == (0.85, 2.5, 0.9, 0)


def test_each_field_is_read_exactly() -> None:
    request = parsed(**WRITTEN)
    assert request.model_dump() == {
        **WRITTEN,
        "task_type": "cover",
        "model": "acestep-v15-base",
        "queue_deadline_s": 60.0,
        "loras": (
            {"path": "blues", "scale": 1.0, "alpha": None},
            {"path": "rock", "scale": -1.0, "alpha": None},
        ),
        "on_model_unavailable": "fail",
        "strict": True,
        "instrumental": False,
        "vocal_language": "pt",
        "bpm": 92,
        "key_scale": "F# minor",
        "time_signature": "6",
        "audio_duration": 95.5,
        "batch_size": 2,
        "candidates": 2,
        "keep": 1,
        "seed": (7, 8),
        "use_random_seed": False,
        "inference_steps": 27,
        "guidance_scale": 5.0,
        "shift": 1.5,
        "timesteps": (0.9, 0.5, 0.0),
        "infer_method": "sde",
        "sampler_mode": "heun",
        "velocity_norm_threshold": 1.5,
        "velocity_ema_factor": 0.1,
        "use_adg": True,
        "cfg_interval_start": 0.1,
        "dcw_enabled": False,
        "dcw_mode": "high",
        "dcw_scaler": 0.1,
        "dcw_wavelet": "db4",
        "retake_seed": 5,
        "retake_variance": 0.3,
        "source_task_id": None,
        "source_index": 2,
        "extend_left_s": 10.0,
        "extend_right_s": 30.0,
        "replace_lines": {"la la": "do do"},
        "variation": 0.4,
        "stems": True,
        "quality": "draft",
        "noise": "device",
        "latent_rescale": 0.9,
        "latent_shift": -0.1,
        "use_tiled_decode": False,
        "audio_format": "flac",
        "mp3_bitrate": "320k",
        "mp3_sample_rate": 44_100,
        "fade_in_duration": 1.5,
        "fade_out_duration": 2.0,
        "enable_normalization": False,
        "normalization_db": -3.0,
        "loudness_lufs": -14.0,
        "true_peak_db": -1.5,
        "timestamps": True,
        "repainting_start": 3.0,
        "repainting_end": 9.5,
        "repaint_mode": "aggressive",
        "repaint_strength": 0.2,
        "repaint_latent_crossfade_frames": 10,
        "repaint_wav_crossfade_sec": 0.0,
        "chunk_mask_mode": "explicit",
        "audio_cover_strength": 0.5,
        "no_fsq": False,
        "cover_noise_strength": 0.2,
        "flow_edit_morph": True,
        "flow_edit_n_min": 0.1,
        "flow_edit_n_max": 0.9,
        "flow_edit_n_avg": 2,
        "track_classes": ("drums", "bass"),
        "thinking": True,
        "sample_mode": True,
        "use_format": True,
        "full_analysis_only": True,
        "extract_codes_only": True,
        "use_cot_metas": False,
        "use_cot_caption": False,
        "is_format_caption": True,
        "constrained_decoding": False,
        "constrained_decoding_debug": True,
        "allow_lm_batch": False,
        "lm_backend": "pt",
        "lm_temperature": 1.0,
        "lm_cfg_scale": 1.0,
        "lm_top_k": 50,
    }


@pytest.mark.parametrize(("field", "name"), SPELLINGS, ids=[name for _, name in SPELLINGS])
def test_a_field_goes_by_each_of_its_names(field: str, name: str) -> None:
    seed = {"seed": 3} if field == "use_random_seed" else {}
    assert parsed(**{name: WRITTEN[field]}, **seed) == parsed(**{field: WRITTEN[field]}, **seed)


@patient
@given(
    choice=st.sampled_from(SPELLINGS),
    source=st.sampled_from(["body", "param_obj", "param_obj text", *METAS, *(f"{name} text" for name in METAS)]),
    rest=BODIES,
)
def test_any_alias_in_any_source_gives_the_same_request(
    choice: tuple[str, str], source: str, rest: dict[str, object]
) -> None:
    field, name = choice
    others = {**rest, "seed": 3}
    others.pop(field, None)
    moved = {**others, **nested(source, {name: WRITTEN[field]})}
    assert parse_request(moved) == parse_request({**others, field: WRITTEN[field]})


@patient
@given(BODIES)
def test_the_canonical_form_reads_back_as_itself_without_a_warning(body: dict[str, object]) -> None:
    request, _ = parse_request(body)
    dump = request.model_dump(mode="json")
    assert GenerationRequest.model_validate(dump) == request
    assert parse_request(dump) == (request, ())
    assert parse_request(json.loads(request.model_dump_json())) == (request, ())


@cache
def published() -> jsonschema.Draft202012Validator:
    """Made once: it takes longer than all else that a request is checked with."""
    return jsonschema.Draft202012Validator(request_json_schema())


@patient
@given(BODIES)
def test_the_canonical_form_validates_against_the_published_schema(body: dict[str, object]) -> None:
    published().validate(parse_request(body)[0].model_dump(mode="json"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
known_names = st.sampled_from([name for _, name in SPELLINGS] + ["param_obj", *METAS, *sorted(NO_COUNTERPART)])
garbage = st.dictionaries(known_names | st.text(max_size=12), json_values | st.sampled_from(["", "-1", "1e999", "[["]))


def attempt(body: dict[str, Any]) -> tuple[GenerationRequest, tuple[str, ...]] | RequestInvalid:
    try:
        return parse_request(body)
    except RequestInvalid as exc:
        return exc


@patient
@given(garbage)
def test_garbage_is_read_or_refused_but_breaks_nothing(body: dict[str, Any]) -> None:
    outcome = attempt(body)
    if isinstance(outcome, RequestInvalid):
        assert outcome.problems
        assert all(len(found.value) <= 100 and found.rule for found in outcome.problems)
        assert str(outcome).encode()
        assert re.fullmatch(TASK_ID_PATTERN, read_task_id(body) or "none")
    else:
        request, warnings = outcome
        assert parse_request(request.model_dump(mode="json"))[0] == request
        assert read_task_id(body) == request.task_id
        assert all(warning.isprintable() for warning in warnings)


@patient
@given(garbage)
def test_what_a_strict_reading_accepts_is_read_the_same_without(body: dict[str, Any]) -> None:
    try:
        strict = parse_request(body, strict=True)
    except RequestInvalid:
        return
    assert parse_request(body) == strict


class TestLookup:
    def test_the_body_outranks_param_obj_which_outranks_the_metadata(self) -> None:
        request, warnings = parse_request(
            {"bpm": 100, "param_obj": {"bpm": 110, "key": "C major"}, "metas": {"keyscale": "Am", "language": "ja"}}
        )
        assert (request.bpm, request.key_scale, request.vocal_language) == (100, "C major", "ja")
        assert warnings == (
            "'param_obj.bpm' is ignored: 'bpm' outranks it",
            "'metas.keyscale' is ignored: 'param_obj.key' outranks it",
        )

    def test_a_name_outranks_its_aliases_and_an_equal_repeat_is_no_matter(self) -> None:
        assert warned(caption="jazz", prompt="blues") == "'caption' is ignored: 'prompt' outranks it"
        assert parsed(caption="blues", prompt="blues").prompt == "blues"

    def test_null_lets_the_next_source_speak(self) -> None:
        assert parsed(prompt=None, caption="blues").prompt == "blues"
        assert parsed(bpm=None, metas={"bpm": 90}).bpm == 90

    @pytest.mark.parametrize("nothing", ["", "  \n"])
    def test_blank_text_means_not_given_and_outranks_the_next_source(self, nothing: object) -> None:
        request, (warning,) = parse_request({"bpm": nothing, "metas": {"bpm": 90}})
        assert request.bpm is None
        assert warning == "'metas.bpm' is ignored: 'bpm' outranks it"
        assert parsed(inference_steps=nothing, param_obj=nothing, metas=nothing).inference_steps == 8

    def test_only_the_first_metadata_object_is_read(self) -> None:
        request, (warning,) = parse_request({"metas": {}, "metadata": {"bpm": 90}, "user_metadata": {"bpm": 80}})
        assert request.bpm == 90
        assert warning == "unknown field 'user_metadata' is ignored: 'metadata' was read"

    def test_the_not_available_of_ace_steps_metadata_means_not_given(self) -> None:
        request = parsed(metas={"bpm": "N/A", "keyscale": "n/a", "timesignature": "N/A", "duration": "N/A"})
        assert (request.bpm, request.key_scale, request.time_signature, request.audio_duration) == (None,) * 4

    @pytest.mark.parametrize("name", ["param_obj", *METAS])
    @pytest.mark.parametrize("bad", ['{"bpm": 9', "[1]", 7, [1], "[" * 100_000])
    def test_a_nested_object_that_cannot_be_read_is_an_error_that_names_it(self, name: str, bad: object) -> None:
        found = problem(**{name: bad})
        assert found.field == name
        assert found.rule.startswith("must be an object, or JSON text of one")

    def test_a_key_twice_in_nested_text_is_reported(self) -> None:
        assert warned(param_obj='{"bpm": 90, "bpm": 91}') == "'param_obj.bpm' is given twice: the last one counts"


class TestWarnings:
    @pytest.mark.parametrize("name", sorted(NO_COUNTERPART))
    def test_a_field_of_newer_servers_is_named_with_its_place(self, name: str) -> None:
        assert warned(**{name: 1}) == f"'{name}' is ignored: {NO_COUNTERPART[name]}"
        assert warned(metas={name: 1}) == f"'metas.{name}' is ignored: {NO_COUNTERPART[name]}"

    def test_a_secret_of_another_service_is_never_repeated(self) -> None:
        assert "hunter2" not in warned(ai_token="hunter2")

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("batchSize", "batch_size"),
            ("audioFormat", "audio_format"),
            ("infer_steps", "inference_steps"),
            ("repaint_start", "repainting_start"),
            ("lyric", "lyrics"),
            ("captoin", "prompt"),
        ],
    )
    def test_a_near_miss_is_answered_with_the_field_that_was_meant(self, name: str, meant: str) -> None:
        assert warned(**{name: 1}) == f"unknown field '{name}' is ignored; did you mean '{meant}'?"

    @pytest.mark.parametrize(
        "name",
        [
            *("cfg_scale", "temperature", "negative_prompt", "vae_model", "style", "tags", "title", "steps", "top_p"),
            *("guidance", "make_instrumental", "lora_path", "time_stamp_unit", "seed_mode", "audio_url", "repaint"),
        ],
    )
    def test_another_word_is_no_misspelling(self, name: str) -> None:
        assert warned(**{name: 1}) == f"unknown field '{name}' is ignored"

    def test_a_field_like_no_other_is_named_alone(self) -> None:
        assert warned(param_obj={"zebra": 1}) == "unknown field 'param_obj.zebra' is ignored"

    def test_thousands_of_unknown_fields_are_counted_not_listed(self) -> None:
        warnings = parse_request({f"zz{number}": 1 for number in range(3_000)})[1]
        assert len(warnings) == 51
        assert warnings[-1] == "2,950 more unknown fields are ignored"

    def test_an_unknown_name_is_shortened_and_made_printable(self) -> None:
        assert warned(**{"\ud800\x1b[2J": 1}) == r"unknown field '\ud800\u001b[2J' is ignored"
        assert len(warned(**{"x" * 100_000: 1})) < 150

    def test_a_flag_that_says_neither_yes_nor_no_is_read_as_false_and_reported(self) -> None:
        request, warnings = parse_request({"thinking": "maybe"})
        assert not request.thinking
        assert warnings == ("'thinking' is 'maybe', which is read as false",)

    def test_format_is_a_flag_and_a_file_format_in_it_is_pointed_elsewhere(self) -> None:
        assert warned(format="wav") == "'format' is 'wav', which is read as false; the file format is 'audio_format'"

    def test_a_language_that_the_model_does_not_know_stays_as_it_is(self) -> None:
        request, (warning,) = parse_request({"language": " Klingon "})
        assert request.vocal_language == "Klingon"
        assert warning.endswith(
            "must be a language code, such as en (written as language); it goes into the prompt as it is"
        )
        assert parsed(language="unknown").vocal_language == "unknown"

    def test_mlx_is_accepted_and_replaced(self) -> None:
        request, warnings = parse_request({"lm_backend": "mlx"})
        assert request.lm_backend == "pt"
        assert warnings == ("LM backend 'mlx' is not supported: 'pt' is used",)


class TestSeed:
    @pytest.mark.parametrize(
        ("written", "read"),
        [
            (5, (5,)),
            ("5", (5,)),
            (0, (0,)),
            ("1, 2,3", (1, 2, 3)),
            ([1, "2", 3.0], (1, 2, 3)),
            ("4,-1", (4, -1)),
            (2**63 - 1, (2**63 - 1,)),
        ],
    )
    def test_a_given_seed_is_honoured(self, written: object, read: tuple[int, ...]) -> None:
        request = parsed(seed=written)
        assert (request.seed, request.use_random_seed) == (read, False)

    @pytest.mark.parametrize("written", [-1, "-1", [-1, -1], "-1,-1", [], None, ""])
    def test_minus_one_and_nothing_are_random(self, written: object) -> None:
        request = parsed(seed=written, use_random_seed=True)
        assert (request.seed, request.use_random_seed) == ((), True)

    def test_an_explicit_wish_for_random_beats_a_seed_and_says_so(self) -> None:
        request, warnings = parse_request({"seed": 5, "useRandomSeed": "true"})
        assert (request.seed, request.use_random_seed) == ((), True)
        assert warnings == ("'seed' is ignored because 'useRandomSeed' is true",)

    def test_no_randomness_without_a_seed_is_drawn_all_the_same_and_says_so(self) -> None:
        request, warnings = parse_request({"use_random_seed": False})
        assert request.use_random_seed
        assert warnings == ("'use_random_seed' is false but no seed is given: one is drawn and reported",)

    @pytest.mark.parametrize("written", ["x", "1,,2", "1;2", 1.5, True, {}, -2, "5,-7", 2**63, [[1]]])
    def test_anything_else_is_an_error(self, written: object) -> None:
        assert problem(seed=written).field == "seed"


class TestErrors:
    def test_all_problems_are_reported_at_once(self) -> None:
        body = {"bpm": "fast", "task_id": "a b", "metas": {"keyscale": "H dur"}, "param_obj": "{", "shift": 0}
        with pytest.raises(RequestInvalid) as caught:
            parse_request(body, strict=True)
        assert [found.field for found in caught.value.problems] == ["param_obj", "task_id", "bpm", "shift", "key_scale"]
        assert "bpm = fast: must be a number" in str(caught.value)

    def test_an_error_says_under_which_name_the_value_was_written(self) -> None:
        found = problem(metas={"keyscale": "H dur"})
        assert (found.field, found.value) == ("key_scale", "H dur")
        assert found.rule.endswith("(written as metas.keyscale)")

    @pytest.mark.parametrize(
        "field", ["bpm", "inference_steps", "guidance_scale", "audio_duration", "batch_size", "lm_top_k"]
    )
    @pytest.mark.parametrize(
        "bad", [True, False, "fast", "1_000", "١٢", "0x10", "nan", "inf", float("nan"), float("inf"), 10**400, [1], {}]
    )
    def test_what_is_no_finite_number_is_named(self, field: str, bad: object) -> None:
        found = problem(**{field: bad})
        assert found.field == field
        assert found.rule.startswith("must be")

    @pytest.mark.parametrize("field", ["bpm", "inference_steps", "batch_size", "lm_top_k"])
    def test_a_fraction_is_no_count_but_a_whole_float_is(self, field: str) -> None:
        assert problem(**{field: "8.5"}).rule == "must be a whole number"
        assert getattr(parsed(**{field: "8.0"}), field) == 8

    @pytest.mark.parametrize(
        ("field", "least", "most"),
        [
            ("inference_steps", 1, 1_000),
            ("guidance_scale", 0, 100),
            ("shift", 0.001, 10),
            ("audio_cover_strength", 0, 1),
            ("cfg_interval_start", 0, 1),
            ("cfg_interval_end", 0, 1),
            ("repainting_start", -86_400, 86_400),
            ("lm_temperature", 0, 5),
            ("lm_cfg_scale", 0, 30),
            ("lm_top_k", 0, 1_000_000),
            ("lm_top_p", 0.001, 1),
            ("lm_repetition_penalty", 0.001, 10),
            ("batch_size", 1, 1_000),
        ],
    )
    def test_bounds_hold_at_both_ends(self, field: str, least: float, most: float) -> None:
        assert getattr(parsed(**{field: least}), field) == least
        assert getattr(parsed(**{field: most}), field) == most
        assert problem(**{field: least - 1}).rule.startswith(("must be at least", "must be above"))
        assert problem(**{field: most + 1}).rule == f"must be at most {most:,}"

    @pytest.mark.parametrize(
        ("field", "limit"),
        [
            ("prompt", 8_192),
            ("lyrics", 32_768),
            ("sample_query", 8_192),
            ("instruction", 2_048),
            ("lm_negative_prompt", 8_192),
            ("lm_model_path", 2_048),
            ("model", 256),
            ("track_name", 128),
        ],
    )
    def test_a_text_may_fill_its_limit_and_is_never_quoted_whole(self, field: str, limit: int) -> None:
        assert len(getattr(parsed(**{field: "x" * limit}), field)) == limit
        found = problem(**{field: "x" * (limit + 1)})
        assert found.rule == f"must have at most {limit:,} characters"
        assert len(found.value) == 100
        assert found.value.endswith("…")

    def test_audio_codes_may_fill_their_limit_and_are_never_quoted_whole(self) -> None:
        codes = "<|audio_code_123|>".ljust(262_144, "x")
        assert parsed(audio_code_string=codes).audio_code_string == codes
        found = problem(audio_code_string=codes + "x")
        assert (found.rule, len(found.value)) == ("must have at most 262,144 characters", 100)

    @pytest.mark.parametrize(("field", "value"), [("bpm", 9_999), ("audio_duration", 5_000), ("batch_size", 64)])
    def test_what_a_tier_decides_is_no_error_here(self, field: str, value: int) -> None:
        assert getattr(parsed(**{field: value}), field) == value

    @pytest.mark.parametrize("field", ["bpm", "audio_duration", "repainting_end"])
    @pytest.mark.parametrize("nothing", [0, -1, "0", "-1.0"])
    def test_zero_and_below_mean_not_given(self, field: str, nothing: object) -> None:
        assert getattr(parsed(**{field: nothing}), field) is None

    def test_a_repaint_may_end_before_it_begins_and_begin_before_the_audio(self) -> None:
        assert parsed(repainting_start=5, repainting_end=-1).repainting_end is None
        assert parsed(repainting_start=5, repainting_end=2).repainting_end == 2
        assert parsed(repainting_start="-2.5").repainting_start == -2.5

    def test_codes_may_be_a_list_which_is_one_text(self) -> None:
        assert parsed(audio_code_string=["<|audio_code_1|>", "<|audio_code_2|>"]).audio_code_string == (
            "<|audio_code_1|><|audio_code_2|>"
        )

    def test_a_guidance_interval_that_ends_before_it_begins_is_an_error(self) -> None:
        assert parsed(cfg_interval_start=0.5, cfg_interval_end=0.5).cfg_interval_end == 0.5
        assert problem(cfg_interval_start=0.6, cfg_interval_end=0.5).rule.endswith(
            "must not be below cfg_interval_start"
        )

    def test_an_unknown_choice_is_answered_with_the_choices(self) -> None:
        expected = "must be 'mp3', 'wav', 'wav32', 'flac', 'ogg', 'opus' or 'aac'"
        assert problem(audio_format="mp5") == FieldProblem(field="audio_format", value="mp5", rule=expected)
        assert problem(task_type="remix").rule.startswith("must be 'text2music', 'cover', 'cover-nofsq'")
        assert problem(infer_method="heun").rule == "must be 'ode' or 'sde'"

    @pytest.mark.parametrize(
        "address", ["/etc/passwd", "song.wav", "file:///a.wav", "http://example.org/a.wav", "s3://"]
    )
    @pytest.mark.parametrize("field", ["src_audio_path", "reference_audio_path"])
    def test_an_input_that_workers_cannot_share_is_an_error(self, field: str, address: str) -> None:
        assert problem(**{field: address}).rule == "must be s3://bucket/key or https://host/path, not a local path"

    def test_a_lone_surrogate_is_an_error_that_can_be_printed(self) -> None:
        found = problem(lyrics="la \ud800 la")
        assert (found.value, found.rule) == (r"la \ud800 la", "must be valid Unicode, without lone surrogates")

    @pytest.mark.parametrize("bad", [["a"], {"a": 1}, True])
    def test_text_is_text(self, bad: object) -> None:
        assert problem(prompt=bad).rule == "must be text"

    def test_a_number_may_stand_for_its_text(self) -> None:
        assert parsed(prompt=1984, task_id=12).prompt == "1984"


class TestMusicalFields:
    @pytest.mark.parametrize(
        ("written", "read"),
        [
            ("C major", "C major"),
            ("c MAJOR", "C major"),
            ("Am", "A minor"),
            ("f#m", "F# minor"),
            ("Bb maj", "Bb major"),
            ("bb minor", "Bb minor"),
            ("b minor", "B minor"),
            ("bm", "B minor"),
            ("E♭ Major", "E♭ major"),
            (" g♯  min ", "G♯ minor"),
        ],
    )
    def test_a_key_may_be_written_in_many_ways(self, written: str, read: str) -> None:
        assert coerce.key_scale(written) == read
        assert parse_request({"key_scale": written}, strict=True)[0].key_scale == written.strip()

    @pytest.mark.parametrize("written", ["H minor", "C", "CM", "C dorian", "C## major", "major", 7])
    def test_what_is_no_key_is_an_error_that_names_the_rule(self, written: object) -> None:
        assert problem(key_scale=written).rule == "must be a key: A to G, then # or b if any, then major or minor"

    @pytest.mark.parametrize(
        ("written", "read"),
        [(4, "4"), ("4/4", "4"), ("3 / 4", "3"), ("6/8", "6"), ("2/4", "2"), (3.0, "3"), ("2", "2")],
    )
    def test_a_time_signature_may_be_written_in_many_ways(self, written: object, read: str) -> None:
        assert coerce.time_signature(written) == read
        assert parse_request({"time_signature": written}, strict=True)[0].time_signature == str(written).strip()

    @pytest.mark.parametrize("written", [5, "5/4", "4/8", "four"])
    def test_a_time_signature_that_the_model_does_not_know_is_an_error(self, written: object) -> None:
        assert problem(time_signature=written).field == "time_signature"

    @pytest.mark.parametrize("code", coerce.LANGUAGES)
    def test_each_language_of_the_model_is_known(self, code: str) -> None:
        assert parsed(language=code.upper()).vocal_language == code

    def test_lists_and_objects_may_be_json_text_as_in_forms(self) -> None:
        found = parsed(track_classes='["drums", "bass"]', seed="[1, 2]", timesteps=" [1, 0.5, 0]", lora='{"path": "a"}')
        assert (found.track_classes, found.seed, found.timesteps) == (("drums", "bass"), (1, 2), (1.0, 0.5, 0.0))
        assert [each.path for each in (*found.all_loras, *parsed(loras='["b", {"path": "c"}]').loras)] == [
            "a",
            "b",
            "c",
        ]
        assert parsed(prompt='["verse"]', lyrics="[verse] la").prompt == '["verse"]'
        assert parsed(track_classes="[drums").track_classes == ("[drums",)

    @pytest.mark.parametrize("written", ["1,0.5,0", [1, "0.5", 0.0], "1.0, 5e-1 ,0"])
    def test_times_come_as_text_or_list(self, written: object) -> None:
        assert parsed(timesteps=written).timesteps == (1.0, 0.5, 0.0)

    @pytest.mark.parametrize("written", ["0.5,0.9", "0.5,0.5", "1.1,0", "0.5,-0.1", "0", "a,b", "0.5,,0.1", [True], {}])
    def test_times_that_do_not_fall_from_one_to_zero_are_an_error(self, written: object) -> None:
        assert problem(timesteps=written).field == "timesteps"

    def test_two_hundred_times_are_enough(self) -> None:
        times = [1 - number / 300 for number in range(201)]
        assert len(parsed(timesteps=times[:200]).timesteps or ()) == 200
        assert problem(timesteps=times).rule == "must have at most 200 entries"

    @pytest.mark.parametrize("field", ["seed", "timesteps", "track_classes"])
    @pytest.mark.parametrize("written", ["1," * 1_000, [1] * 1_001])
    def test_a_list_beyond_all_need_is_refused_before_its_entries_are_read(self, field: str, written: object) -> None:
        assert problem(**{field: written}).rule == "must have at most 1,000 entries"

    def test_a_key_with_very_many_spaces_costs_little_time(self) -> None:
        """Two places may hold the spaces: trying every way to share them out would take days."""
        began = time.process_time()
        assert problem(key="A" + " " * 1_000_000 + "x").field == "key_scale"
        assert time.process_time() - began < 2

    @pytest.mark.parametrize("written", ["drums, bass", ["drums", " bass ", ""], "drums,bass,"])
    def test_tracks_come_as_text_or_list(self, written: object) -> None:
        assert parsed(instruments=written).track_classes == ("drums", "bass")

    @pytest.mark.parametrize(
        ("lyrics", "expected"), [("", True), (" [Inst]\n", True), ("[instrumental]", True), ("[verse]\nla", False)]
    )
    def test_a_song_without_words_is_instrumental(self, lyrics: str, expected: bool) -> None:  # noqa: FBT001 - a table
        assert parsed(lyrics=lyrics).is_instrumental is expected

    @pytest.mark.parametrize("lyrics", ["", "[verse]\nla", "[inst]"])
    def test_an_instrumental_has_no_words_whatever_the_lyrics_are(self, lyrics: str) -> None:
        request, warnings = parse_request({"instrumental": True, "lyrics": lyrics})
        assert request.is_instrumental
        assert request.lyrics == ("[inst]" if lyrics == "[inst]" else "[Instrumental]")
        ignored = ("'lyrics' is ignored because 'instrumental' is true",)
        assert warnings == (ignored if lyrics.startswith("[verse]") else ())

    def test_a_cover_without_quantised_codes_is_the_task_of_that_name(self) -> None:
        assert parsed(task_type="cover", no_fsq=True).task_type == "cover-nofsq"
        assert parsed(task_type="repaint", no_fsq=True).task_type == "repaint"


class TestAudioInTheRequest:
    @pytest.mark.parametrize("field", EMBEDDED_AUDIO)
    @pytest.mark.parametrize("written", ["UklGRg==", " UklG\r\nRg== ", "data:audio/wav;base64,UklGRg=="])
    def test_a_file_comes_as_base64_or_data_url(self, field: str, written: str) -> None:
        assert getattr(parsed(**{field: written}), field) == "UklGRg=="

    @pytest.mark.parametrize("name", ["ctx_audio_base64", "srcAudioBase64"])
    def test_it_has_the_names_that_clients_use(self, name: str) -> None:
        assert parsed(**{name: "UklGRg=="}).has_source

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("written", ["UklGRg", "%%% secret %%%", "data:audio/wav,secret", 7, ["UklGRg=="]])
    def test_what_is_no_base64_is_refused_and_not_repeated(self, written: object, strict: bool) -> None:  # noqa: FBT001 - a table
        with pytest.raises(RequestInvalid) as caught:
            parse_request({"src_audio_base64": written}, strict=strict)
        (found,) = caught.value.problems
        assert found.field == "src_audio_base64"
        assert "Base64" in found.rule
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("written", "what_to_do"),
        [
            ("UklGRg", ", with its padding: append = until its length is a multiple of 4"),
            ("UklGRg=", ", with its padding: append = until its length is a multiple of 4"),
            ("UklG=Rg=", ": discontinuous padding not allowed"),
            ("Ukl_Rg==", ", with + and / where the URL-safe alphabet has - and _"),
            ("Ukl-Rg", ", with + and / where the URL-safe alphabet has - and _"),
        ],
    )
    def test_the_variants_of_base64_that_programs_write_are_refused_with_what_to_do(
        self, written: str, what_to_do: str
    ) -> None:
        with pytest.raises(RequestInvalid) as caught:
            parse_request({"src_audio_base64": written})
        assert caught.value.problems[0].rule == f"must be a file in Base64{what_to_do}"

    def test_an_address_outranks_it(self) -> None:
        body = {"srcAudioBase64": "UklGRg==", "ctx_audio_path": "s3://in/a.wav"}
        request, warnings = parse_request(body)
        assert (request.src_audio_path, request.src_audio_base64) == ("s3://in/a.wav", None)
        assert warnings == ("'srcAudioBase64' is ignored: 'ctx_audio_path' outranks it",)

    def test_it_is_in_no_copy_of_the_request(self) -> None:
        request = parsed(src_audio_base64="UklGRg==", reference_audio_base64="UklGRg==")
        assert "UklG" not in f"{request!r}{request.model_dump()}{request.model_dump_json()}"


class TestLora:
    @pytest.mark.parametrize(
        ("written", "path", "scale"),
        [
            ({"path": "jazz", "scale": "0.5"}, "jazz", 0.5),
            ({"path": "jazz.safetensors"}, "jazz.safetensors", 1),
            ({"path": " loras/Big Band-v1.2+ ", "scale": None}, "Big Band-v1.2+", 1),
            ("S3://styles/a b/jazz.safetensors", "s3://styles/a b/jazz.safetensors", 1),
            ({"path": "s3://styles/jazz/", "scale": -4}, "s3://styles/jazz/", -4),
        ],
    )
    def test_it_is_a_name_or_an_object_of_s3_and_a_scale(self, written: object, path: str, scale: float) -> None:
        assert parsed(lora=written).lora == LoraChoice(path=path, scale=scale)

    @pytest.mark.parametrize(
        "path",
        [
            *(
                "..",
                ".",
                ".hidden",
                "../jazz",
                "loras/../jazz",
                "/etc/passwd",
                "a/b",
                "a\\b",
                "~/jazz",
                "C:jazz",
                "-jazz",
            ),
            *("jazz\0", "jazz\nblues", "é", "x" * 129, "$HOME", "loras/", "loras/loras/jazz"),
            *(
                "https://example.org/jazz.safetensors",
                "file:///jazz.safetensors",
                "s3://b/jazz.bin",
                "s3://b/jazz.ckpt",
            ),
            *("s3:/b/jazz.safetensors", "s3://b/jazz", "data:,jazz.safetensors", {}, True, ["jazz"]),
        ],
    )
    def test_a_place_of_another_kind_is_an_error_that_names_what_is_read(self, path: object) -> None:
        found = problem(lora={"path": path})
        assert found.field == "lora"
        assert found.rule.startswith(("path must be s3://bucket/key.safetensors", "path must be text"))

    @pytest.mark.parametrize(
        ("written", "rule"),
        [
            ({"path": "jazz", "scale": 4.5}, "scale must be at most 4"),
            ({"path": "jazz", "scale": -5}, "scale must be at least -4"),
            ({"path": "jazz", "scale": "1e999"}, "scale must be a finite number"),
            ({"path": "jazz", "scale": "loud"}, "scale must be a number"),
            ({"path": "jazz", "weight": 1}, "weight is not one of its fields"),
            ({"scale": 1}, "path must be given"),
            ({}, "path must be given"),
            ({"path": f"s3://b/{'x' * 1_024}.safetensors"}, "path must have at most 1,024 characters"),
            (["jazz"], "must be an object of path and scale, or the path alone"),
            (7, "must be an object of path and scale, or the path alone"),
        ],
    )
    def test_what_is_wrong_is_said_by_name(self, written: object, rule: str) -> None:
        assert problem(lora=written).rule == rule

    def test_several_are_read_after_the_one(self) -> None:
        request = parsed(lora="jazz", loras=["blues", {"path": "rock", "scale": None, "alpha": "16"}])
        assert request.all_loras == (
            LoraChoice(path="jazz"),
            LoraChoice(path="blues"),
            LoraChoice(path="rock", alpha=16),
        )
        assert parsed(loras="jazz").all_loras == parsed(loras={"path": "jazz"}).all_loras == request.all_loras[:1]
        assert parsed(loras=[]).all_loras == parsed(loras=None).all_loras == ()

    @pytest.mark.parametrize(
        ("written", "rule"),
        [
            ([{"path": "jazz"}, {"path": "blues", "scale": 5}], "1.scale must be at most 4"),
            (["jazz", {"scale": 1}], "1.path must be given"),
            ([{"path": "jazz", "alpha": "much"}], "0.alpha must be a number"),
            (["jazz", 7], "must be an object of path and scale, or the path alone"),
            (["jazz"] * 9, "must have at most 8 entries"),
        ],
    )
    def test_what_is_wrong_with_one_of_several_is_said_with_its_number(self, written: object, rule: str) -> None:
        assert problem(loras=written).rule == rule

    def test_an_unknown_part_is_shown_printable_and_short(self) -> None:
        rule = problem(lora={"path": "jazz", "\x1b" + "x" * 500: 1}).rule
        assert rule.isprintable()
        assert len(rule) < 150


class TestTaskId:
    @pytest.mark.parametrize("good", ["a", "A-1_b", "x" * 128, 7, " a\n"])
    def test_a_valid_one_is_read_even_from_a_broken_request(self, good: object) -> None:
        assert read_task_id({"task_id": good, "bpm": "fast", "metas": "{"}) == str(good).strip()

    @pytest.mark.parametrize("bad", ["", None, "a b", "x" * 129, "a/b", "é", True, ["a"], "\ud800"])
    def test_an_invalid_one_is_not_read(self, bad: object) -> None:
        assert read_task_id({"task_id": bad}) is None

    def test_it_may_be_nested_like_any_other_field(self) -> None:
        assert read_task_id({"param_obj": '{"task_id": "t"}'}) == "t"


class TestSchema:
    def test_it_is_valid_describes_every_field_and_lists_the_aliases(self) -> None:
        schema = request_json_schema()
        jsonschema.Draft202012Validator.check_schema(schema)
        assert set(schema["properties"]) == set(GenerationRequest.model_fields)
        assert all(field["description"] for field in schema["properties"].values())
        assert schema["properties"]["prompt"]["x-aliases"] == ["caption", "captions"]

    def test_it_refuses_what_the_reading_refuses(self) -> None:
        validator = jsonschema.Draft202012Validator(request_json_schema())
        for body in (
            {"inference_steps": 0},
            {"audio_format": "mp5"},
            {"task_id": "a b"},
            {"bpm": 1e9},
            {"nonsense": 1},
        ):
            assert not validator.is_valid(body)

    def test_no_name_belongs_to_two_fields(self) -> None:
        names = [name for _, name in SPELLINGS]
        assert len(names) == len(set(names))
        assert not set(names) & {*NO_COUNTERPART, *METAS}

    def test_a_request_cannot_be_changed_or_extended(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            parsed().prompt = "other"  # type: ignore[misc]  # the point of the test
        with pytest.raises(ValueError, match="extra_forbidden"):
            GenerationRequest.model_validate({"nonsense": 1})


class TestCandidates:
    """How many songs are made, and how many of them are kept."""

    def test_they_say_how_many_songs_are_made_and_one_is_kept(self) -> None:
        request, warnings = parse_request({"candidates": "4"})
        assert (request.candidates, request.keep, request.batch_size, warnings) == (4, 1, 4, ())

    @pytest.mark.parametrize("name", ["best_of", "bestOf", "num_candidates"])
    def test_they_have_the_names_of_other_interfaces(self, name: str) -> None:
        assert parsed(**{name: 3}).candidates == 3

    @pytest.mark.parametrize("value", [None, 0, "0", ""])
    def test_none_are_not_given(self, value: object) -> None:
        request = parsed(candidates=value, batch_size=2)
        assert (request.candidates, request.batch_size) == (None, 2)

    def test_the_operators_batch_size_does_not_count_beside_them(self) -> None:
        request, warnings = parse_request({"candidates": 4}, strict=True, defaults={"batch_size": 2})
        assert (request.batch_size, warnings) == (4, ())

    @pytest.mark.parametrize(
        ("body", "settled", "problem"),
        [
            (
                {"candidates": 4, "batch_size": 2},
                (4, 4, 1),
                "'batch_size' = 2: must not be given beside candidates, which says how many are made; it is ignored",
            ),
            ({"candidates": 2, "keep": 3}, (2, 2, 2), "'keep' = 3: must be at most candidates, 2; 2 is used"),
            (
                {"keep": 2, "batch_size": 3},
                (None, 3, 1),
                "'keep' = 2: needs candidates: how many songs it is the best of; it is ignored",
            ),
        ],
    )
    def test_a_contradiction_is_a_warning_and_an_error_of_a_strict_request(
        self, body: dict[str, object], settled: tuple[object, ...], problem: str
    ) -> None:
        request, warnings = parse_request(body)
        assert ((request.candidates, request.batch_size, request.keep), warnings) == (settled, (problem,))
        with pytest.raises(RequestInvalid) as caught:
            parse_request(body, strict=True)
        assert [each.field for each in caught.value.problems] == [problem.split("'")[1]]

    def test_the_effective_request_can_be_sent_again(self) -> None:
        request = parsed(candidates=4, keep=2)
        again, warnings = parse_request(request.model_dump(mode="json"), strict=True)
        assert (again, warnings) == (request, ())
