# SPDX-License-Identifier: Apache-2.0
"""The requests that the page's form may send."""

import pytest

from acestep_consumer.domain.errors import InvalidRequest
from acestep_consumer.webui.job_request import plain
from acestep_consumer.webui.server import read_form
from acestep_schemas.request import RequestInvalid


def test_a_request_gets_an_id_and_empty_fields_are_left_out() -> None:
    body, request = read_form({"prompt": "jazz", "lyrics": "", "seed": None, "audio_duration": "90"})
    assert set(body) == {"prompt", "audio_duration", "task_id"}
    assert (request.prompt, request.audio_duration) == ("jazz", 90.0)
    assert len(str(body["task_id"])) == 36


def test_a_request_keeps_the_id_that_the_page_gave_it() -> None:
    assert read_form({"prompt": "jazz", "task_id": "mine"})[0]["task_id"] == "mine"


def test_every_field_that_is_wrong_is_named() -> None:
    with pytest.raises(RequestInvalid) as caught:
        read_form({"prompt": "jazz", "audio_format": "midi", "seed": "seven", "task_id": "../up"})
    assert {problem.field for problem in caught.value.problems} == {"audio_format", "seed", "task_id"}


@pytest.mark.parametrize("body", [[], "x", None, 7, {}, {"prompt": "  "}, {"lyrics": "la"}])
def test_a_request_without_words_is_refused(body: object) -> None:
    with pytest.raises(RequestInvalid):
        read_form(body)


@pytest.mark.parametrize("name", ["src_audio_base64", "reference_audio_base64", "prompt_of_tomorrow"])
def test_audio_in_the_request_itself_and_unknown_fields_are_refused(name: str) -> None:
    with pytest.raises(RequestInvalid, match=f"{name} = …: is not a field of this form"):
        read_form({"prompt": "jazz", name: "UklGRg=="})


def test_a_request_is_sent_again_with_every_field_that_it_had() -> None:
    asked = {
        "prompt": "jazz",
        "bpm": 90,
        "key_scale": "F# minor",
        "inference_steps": 20,
        "guidance_scale": 5.5,
        "lora": {"path": "mine", "scale": 0.5},
        "task_type": "cover",
        "src_audio_path": "s3://acestep/jobs/one/0.mp3",
    }
    body, request = read_form(asked)
    assert {name: value for name, value in body.items() if name != "task_id"} == asked
    shown = plain(request)
    assert {name: shown[name] for name in asked if name != "lora"} == {n: v for n, v in asked.items() if n != "lora"}
    assert read_form({**shown, "lora": asked["lora"]})[1].bpm == 90


def test_a_song_that_is_made_from_another_one_needs_no_words() -> None:
    body, _ = read_form({"task_type": "cover", "src_audio_path": "s3://acestep/jobs/one/0.mp3"})
    assert body["src_audio_path"] == "s3://acestep/jobs/one/0.mp3"


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"extend_left_s": 5, "extend_right_s": 5}, "extend_right_s"),
        ({"replace_lines": {"la": "lo"}, "repainting_start": 3}, "repainting_start"),
        ({"stems": True, "candidates": 4}, "candidates"),
        ({}, "source_task_id"),
    ],
)
def test_edits_that_contradict_each_other_are_refused_as_a_worker_would(asked: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_form({"prompt": "jazz", "source_task_id": "one"} | asked)
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize("field", [{"audio_duration": 9_999}, {"batch_size": 50}, {"candidates": 9}])
def test_what_no_tier_allows_is_refused_as_submit_does(field: dict[str, object]) -> None:
    with pytest.raises(RequestInvalid, match=r"must be \d to (600|8)") as caught:
        read_form({"prompt": "jazz", **field})
    assert [problem.field for problem in caught.value.problems] == [next(iter(field))]
    assert read_form({"prompt": "jazz", "on_limit": "clamp", **field})[1].on_limit == "clamp"
    with pytest.raises(RequestInvalid):
        read_form({"prompt": "jazz", "on_limit": "reject", **field})


def test_a_task_without_the_source_that_it_needs_is_refused_as_submit_does() -> None:
    with pytest.raises(RequestInvalid, match="cover needs source audio: s3://bucket/key or https://host/path"):
        read_form({"prompt": "jazz", "task_type": "cover"})
    assert read_form({"prompt": "jazz", "task_type": "cover", "audio_code_string": "<|audio_code_1|>"})
    with pytest.raises(RequestInvalid, match="flow_edit_morph needs source audio") as caught:
        read_form({"prompt": "jazz", "flow_edit_morph": True})
    assert [problem.field for problem in caught.value.problems] == ["src_audio_path"]
