# SPDX-License-Identifier: Apache-2.0
"""A request is built from flags and a file, and checked before it is sent."""

from pathlib import Path
from typing import Any

import pytest

from acestep_consumer.commands.submit.request import (
    FLAGS,
    RequestRefused,
    assignments,
    check,
    line_fields,
    lora_fields,
    merge,
    read_form,
    read_json,
    read_text,
)
from acestep_schemas.request import GenerationRequest


def refused(body: dict[str, Any], *from_flags: str, strict: bool = False) -> list[str]:
    with pytest.raises(RequestRefused) as caught:
        check(body, frozenset(from_flags), strict=strict)
    return str(caught.value).splitlines()


def test_every_flag_is_for_a_field_that_exists() -> None:
    assert set(FLAGS) <= set(GenerationRequest.model_fields)


def test_flags_win_over_the_file_also_where_that_uses_an_alias() -> None:
    file = {"caption": "rock", "duration": 10, "seed": 1}
    body = merge(file, {"audio_duration": 20.0, "seed": 2, "bpm": None})
    assert body == {"caption": "rock", "audio_duration": 20.0, "seed": 2}
    assert check(body, frozenset()) == ()


def test_a_wrong_value_of_a_flag_is_refused_and_one_of_a_file_is_read_as_a_worker_reads_it() -> None:
    body = {"prompt": "x", "audio_format": "m4a", "bpm": "fast"}
    assert refused(body, "audio_format") == [
        "--format m4a: must be 'mp3', 'wav', 'wav32', 'flac', 'ogg', 'opus' or 'aac'"
    ]
    assert [warning.partition(":")[0] for warning in check(body, frozenset())] == [
        "'bpm' = fast",
        "'audio_format' = m4a",
    ]
    assert len(refused({**body, "strict": True})) == 2
    assert refused({"src_audio_path": "/etc/passwd"})[0].startswith("src_audio_path = /etc/passwd: must be s3://")


def test_any_field_can_be_set_by_any_of_its_names() -> None:
    found = assignments(["duration=30", "lyrics=[verse]\na=b", 'loras=[{"path": "jazz"}]', "prompt="])
    assert found == {"duration": "30", "lyrics": "[verse]\na=b", "loras": [{"path": "jazz"}], "prompt": ""}
    assert merge({"audio_duration": 10, "targetDuration": 5, "bpm": 90}, {"duration": "30"}) == {
        "bpm": 90,
        "duration": "30",
    }


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["prompt"], "--set prompt: must be name=value"),
        (["=x"], "--set =x: must be name=value"),
        (["bpm=1", "bpm=2"], "--set bpm is given twice"),
    ],
)
def test_what_sets_no_field_is_refused(texts: list[str], said: str) -> None:
    with pytest.raises(RequestRefused, match=said):
        assignments(texts)


def test_one_lora_or_several_take_the_place_of_those_in_the_file() -> None:
    assert lora_fields(["a"], []) == {"lora": "a"}
    assert lora_fields(["a"], [0.5]) == {"lora": {"path": "a", "scale": 0.5}}
    several = lora_fields(["a", "b"], [0.5])
    assert several == {"loras": [{"path": "a", "scale": 0.5}, "b"]}
    assert merge({"lora": "old", "bpm": 90}, several) == {"bpm": 90, **several}
    with pytest.raises(RequestRefused, match="there are more --lora-scale than --lora"):
        lora_fields(["a"], [1, 2])


def test_lines_are_replaced_one_by_one_or_by_section() -> None:
    assert line_fields([]) == {}
    lines = line_fields(["rain on the square = snow on the square", "play it slow=2 + 2 = 4"])
    assert lines == {"replace_lines": {"rain on the square": "snow on the square", "play it slow": "2 + 2 = 4"}}
    section = line_fields(['{"section": "verse 2", "lyrics": "la"}'])
    assert section == {"replace_lines": {"section": "verse 2", "lyrics": "la"}}
    for found in (lines, section):
        assert check({"source_task_id": "first", **found}, frozenset(found)) == ()
    for wrong in ("rain", "=snow", "{}", '{"": "snow"}', '{"a'):
        with pytest.raises(RequestRefused, match="must be 'old line=new line'"):
            line_fields([wrong])
    with pytest.raises(RequestRefused, match="replaces 'rain' twice"):
        line_fields(["rain=snow", "rain=hail"])


def test_a_file_may_be_a_form(tmp_path: Path) -> None:
    file = tmp_path / "body"
    file.write_text("caption=slow+jazz&seed=1&seed=2\n")
    assert read_form(file) == {"caption": "slow jazz", "seed": ["1", "2"]}
    file.write_text("prompt=%ff")
    with pytest.raises(RequestRefused, match="body: the form is not UTF-8"):
        read_form(file)


def test_what_a_worker_would_reject_is_refused_by_flag_or_field_all_at_once() -> None:
    body = {"prompt": "x", "audio_format": "m4a", "src_audio_path": "/etc/passwd", "bpm": "fast"}
    found = refused(body, "audio_format", strict=True)
    assert len(found) == 3
    assert any(line.startswith("--format m4a: must be 'mp3'") for line in found)
    assert any(line.startswith("src_audio_path = /etc/passwd: must be s3://bucket/key") for line in found)
    assert any(line.startswith("bpm = fast: ") for line in found)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"audio_duration": 9999}, "audio_duration = 9999: must be 0 to 600"),
        ({"batch_size": 12}, "batch_size = 12: must be 1 to 8"),
        ({"candidates": 12}, "candidates = 12: must be 1 to 8"),
    ],
)
def test_what_no_gpu_is_allowed_to_do_is_refused_unless_clamping_is_asked_for(body: dict[str, Any], said: str) -> None:
    assert refused(body) == [f"{said} (--on-limit clamp lets the worker adjust it)"]
    assert refused({**body, "on_limit": "reject"}) == [f"{said} (--on-limit clamp lets the worker adjust it)"]
    assert check({**body, "on_limit": "clamp"}, frozenset()) == (f"{said}; the worker will adjust it",)


def test_more_songs_than_candidates_cannot_be_kept() -> None:
    body = {"prompt": "a", "candidates": 2, "keep": 3}
    assert refused(body, "candidates", "keep") == ["--keep 3: must be at most candidates, 2"]
    assert check(body | {"keep": 2}, frozenset({"candidates", "keep"})) == ()


@pytest.mark.parametrize("task", ["cover", "cover-nofsq", "repaint", "extract", "lego", "complete"])
def test_a_task_on_audio_wants_the_audio(task: str) -> None:
    assert refused({"task_type": task}, "task_type") == [f"--task-type {task}: needs source audio (--source)"]
    assert check({"task_type": task, "src_audio_path": "s3://b/k"}, frozenset()) == ()
    assert check({"task_type": "cover", "audio_code_string": "<|audio_code_1|>"}, frozenset()) == ()


def test_a_flow_edit_wants_the_audio_and_is_named_as_what_wants_it() -> None:
    assert refused({"flow_edit_morph": True}) == ["flow_edit_morph = true: needs source audio (--source)"]


def test_a_misspelled_field_is_a_warning_with_a_guess() -> None:
    (warning,) = check({"prompt": "x", "audio_formt": "wav"}, frozenset())
    assert "audio_formt" in warning
    assert "audio_format" in warning


def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    with pytest.raises(RequestRefused, match=r"request\.json cannot be read: No such file"):
        read_json(file)
    file.write_text("[1]")
    with pytest.raises(RequestRefused, match=r"request\.json contains a list; a request is a JSON object"):
        read_json(file)
    file.write_text("{")
    with pytest.raises(RequestRefused, match=r"request\.json is not JSON"):
        read_json(file)
    file.write_bytes(b"\xff")
    with pytest.raises(RequestRefused, match=r"request\.json is not UTF-8 text"):
        read_text(file)


def test_edits_that_a_worker_would_reject_are_refused_with_the_flag() -> None:
    body = {"source_task_id": "first", "variation": 0.5, "stems": True}
    assert refused(body, "stems") == ["--stems True: variation is given, too: make one song, then the other from it"]
    assert refused({"variation": 0.5}, "variation") == [
        "--variation 0.5: needs source_task_id: the id of the task that made the song"
    ]
    assert check({"source_task_id": "first", "replace_lines": '{"a": "b"}'}, frozenset()) == ()
