# SPDX-License-Identifier: Apache-2.0
"""What ``check`` says of a request: the job that a worker of a given tier makes of it, or the error."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from acestep_consumer.commands.check import CheckFailed, CheckOptions, CheckReport, check, examine
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings, load

URL = {"ACESTEP_AMQP_URL": "amqp://localhost"}


def settings_with(**variables: str) -> Settings:
    return load({**URL, **variables}, None)


def report(body: object, *, settings: Settings | None = None, **options: Any) -> CheckReport:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return examine(settings or settings_with(), CheckOptions(file=Path("-"), **options), raw)


def test_the_effective_request_is_that_of_the_tier_with_every_change() -> None:
    found = report({"caption": "jazz", "duration": 600, "bpm": "fast", "audio_format": "m4a"}, tier="tier4").as_json()
    assert (found["accepted"], found["tier"], found["lm"]) == (True, "tier4", None)
    assert found["request"]["audio_duration"] == 360
    assert found["request"]["audio_format"] == "flac"
    assert [change["field"] for change in found["adjustments"]] == ["audio_duration"]
    assert [warning.partition("'")[2].partition("'")[0] for warning in found["warnings"]] == ["bpm", "audio_format"]
    assert not {"task_id", "seed", "retake_seed"} & set(found["request"])


def test_an_id_and_seeds_of_the_request_are_shown() -> None:
    found = report({"task_id": "order-1", "seed": 7, "batch_size": 2}).as_json()["request"]
    assert (found["task_id"], found["seed"]) == ("order-1", [7, 8])


@pytest.mark.parametrize(
    ("options", "tier", "lm"),
    [
        ({}, "unlimited", "acestep-5Hz-lm-4B"),
        ({"vram_gb": 15.0}, "tier5", "acestep-5Hz-lm-1.7B"),
        ({"vram_gb": 8.0}, "tier3", None),
        ({"vram_gb": 8.0, "lm": True}, "tier3", "acestep-5Hz-lm-0.6B"),
        ({"tier": "tier6", "lm": False}, "tier6", None),
    ],
)
def test_the_worker_has_the_language_model_of_its_tier(options: dict[str, Any], tier: str, lm: str | None) -> None:
    found = report({"prompt": "jazz"}, **options).as_json()
    assert (found["tier"], found["lm"]) == (tier, lm)


def test_the_operators_settings_count() -> None:
    settings = settings_with(
        ACESTEP_TIER_TABLE="acestep-1.5-2026-06",
        ACESTEP_DEFAULT_FORMAT="flac",
        ACESTEP_CONFIG_PATH="acestep-v15-base",
        MAX_CUDA_VRAM="12",
    )
    found = report({"task_type": "lego", "src_audio_path": "s3://b/k"}, settings=settings, lm=False).as_json()
    assert (found["tier"], found["table_version"]) == ("tier4", "acestep-1.5-2026-06")
    assert (found["model"]["used"], found["request"]["audio_format"]) == ("acestep-v15-base", "flac")


@pytest.mark.parametrize(
    ("body", "options", "code"),
    [
        ({"bpm": "fast"}, {"strict": True}, "invalid_request"),
        ({"input": {}}, {}, "invalid_request"),
        ({"task_type": "lego", "src_audio_path": "s3://b/k"}, {}, "task_unsupported"),
        ({"thinking": True}, {"lm": False}, "lm_unavailable"),
        ({"audio_duration": 600, "on_limit": "reject"}, {"tier": "tier1"}, "limit_exceeded"),
        ("{", {}, "malformed_body"),
    ],
)
def test_what_makes_no_song_has_the_error_of_its_event(body: object, options: dict[str, Any], code: str) -> None:
    found = report(body, **options).as_json()
    assert (found["accepted"], found["request"], found["error"]["code"]) == (False, None, code)


def test_a_body_may_be_a_form() -> None:
    assert report("caption=slow+jazz&bpm=90", form=True).as_json()["request"]["bpm"] == 90


def test_an_unknown_tier_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(CheckFailed, match=r"--tier huge: acestep-1\.5-2026-02 has tier1, "):
        report({"prompt": "x"}, tier="huge")


def test_the_table_names_what_is_used_and_the_exit_code_says_how_it_would_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, note = tmp_path / "body.json", Console(stderr=True)
    file.write_text(json.dumps({"prompt": "[jazz]", "audio_duration": 600, "bpm": "fast"}))
    assert check(settings_with(), CheckOptions(file=file, tier="tier1"), note) is Exit.DONE
    shown = capsys.readouterr()
    assert "Accepted by a worker of tier1 (acestep-1.5-2026-02), without the language model" in shown.out
    assert "[jazz]" in shown.out
    assert "adjusted audio_duration from 600.0 to 180" in shown.out
    assert "warning: 'bpm' = fast" in shown.err
    file.write_text("[]")
    assert check(settings_with(), CheckOptions(file=file), note) is Exit.JOB_FAILED
    assert "rejected by a worker of unlimited" in capsys.readouterr().err
    assert check(settings_with(), CheckOptions(file=tmp_path / "none"), note) is Exit.USAGE


def test_edits_are_shown_as_the_fields_that_they_stand_for() -> None:
    body = {"src_audio_path": "s3://b/k", "stems": True, "track_classes": "drums", "model": "acestep-v15-base"}
    found = report(body, settings=settings_with(ACESTEP_CONFIG_PATH="acestep-v15-base")).as_json()
    assert found["request"]["task_type"] == "extract"
    assert [edit["field"] for edit in found["edits"]] == ["task_type"]


def test_what_only_a_worker_can_look_up_is_said() -> None:
    (warning,) = report({"source_task_id": "first", "variation": 0.5}).as_json()["warnings"]
    assert warning.startswith("source_task_id = first: only a worker looks it up")
    refused = report({"source_task_id": "first", "variation": 0.5, "stems": True}).as_json()
    assert refused["error"]["code"] == "invalid_request"
