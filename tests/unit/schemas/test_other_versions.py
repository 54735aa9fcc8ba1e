# SPDX-License-Identifier: Apache-2.0
"""What other versions write is read: the samples of each release, and messages that know more than this version."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from acestep_schemas import examples
from acestep_schemas.events import ErrorCode, JobEvent, WorkerEvent, parse_event, parse_manifest
from acestep_schemas.request import parse_request

SAMPLES = Path(__file__).parents[2] / "samples"
RELEASES = sorted(folder.name for folder in SAMPLES.iterdir() if folder.is_dir())
TYPES = {state for kind in get_args(JobEvent) for state in (kind.state,)} | {
    f"worker.{state}" for state in ("ready", "draining", "stopped")
}
MANIFESTS = {"completed", "failed", "rejected", "cancelled", "expired"}


def samples(kind: str) -> list[Any]:
    return [
        pytest.param(path, id=f"{path.parents[1].name} {path.stem}")
        for release in RELEASES
        for path in sorted((SAMPLES / release / kind).iterdir())
    ]


def lost(sent: Any, read: Any) -> list[str]:
    """The fields of ``sent`` that ``read`` has not, or has with another value."""
    if isinstance(sent, dict) and isinstance(read, dict):
        return [f"{name}.{rest}" for name, value in sent.items() for rest in lost(value, read.get(name, "not there"))]
    if isinstance(sent, list) and isinstance(read, list) and len(sent) == len(read):
        return [rest for one, other in zip(sent, read, strict=True) for rest in lost(one, other)]
    return [] if sent == read else [f"{sent!r} is {read!r}"]


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_has_a_sample_of_every_message(release: str) -> None:
    assert {"0.1.0", "0.2.0"} <= set(RELEASES)
    assert {path.stem for path in (SAMPLES / release / "events").iterdir()} == TYPES
    assert {path.stem for path in (SAMPLES / release / "manifests").iterdir()} == MANIFESTS


@pytest.mark.parametrize("path", samples("events"))
def test_every_released_event_is_read_with_all_that_it_says(path: Path) -> None:
    event = parse_event(path.read_bytes())
    assert path.stem in (event.state, f"worker.{event.state}")
    assert lost(json.loads(path.read_bytes()), json.loads(event.to_json())) == []


@pytest.mark.parametrize("path", samples("manifests"))
def test_every_released_manifest_is_read_with_all_that_it_says(path: Path) -> None:
    data = parse_manifest(path.read_bytes())
    assert data.state == path.stem
    assert lost(json.loads(path.read_bytes()), data.model_dump(mode="json")) == []


@pytest.mark.parametrize("path", samples("requests"))
def test_every_released_request_is_valid_and_has_no_field_that_is_not_known(path: Path) -> None:
    _, warnings = parse_request(json.loads(path.read_bytes()))
    assert [warning for warning in warnings if "unknown field" in warning] == []


def of_next_version(value: Any) -> Any:
    """The same JSON with a field more in every object, but for ``details``, which may hold any."""
    if isinstance(value, dict):
        more = {name: each if name == "details" else of_next_version(each) for name, each in value.items()}
        return {**more, "of_next_version": {"nested": [1, None]}}
    return [of_next_version(each) for each in value] if isinstance(value, list) else value


def read_event(event: dict[str, Any]) -> JobEvent | WorkerEvent:
    return parse_event(json.dumps(event).encode())


@pytest.mark.parametrize("kind", list(examples.events()), ids=lambda kind: kind.__name__)
def test_fields_of_the_next_version_are_ignored_wherever_they_are(kind: type) -> None:
    example = examples.events()[kind]
    assert read_event(of_next_version(json.loads(example.to_json()))) == example


@pytest.mark.parametrize("data", [examples.completed().data, examples.unfinished("failed").data], ids=["songs", "none"])
def test_fields_of_the_next_version_are_ignored_in_a_manifest(data: Any) -> None:
    body = json.dumps(of_next_version(data.model_dump(mode="json"))).encode()
    assert parse_manifest(body) == data


@pytest.mark.parametrize("status", ["failed", "rejected", "cancelled", "expired"])
def test_an_error_code_of_the_next_version_is_shown_as_it_is(status: str) -> None:
    sent = json.loads(examples.unfinished(status).to_json())
    sent["data"]["error"]["code"] = "quota_exceeded"
    event = read_event(sent)
    assert event.state == status
    assert event.state in ("failed", "rejected", "cancelled", "expired")
    code = event.data.error.code
    assert (code, f"{code}", isinstance(code, ErrorCode)) == ("quota_exceeded", "quota_exceeded", True)
    assert code not in set(ErrorCode)
    assert json.loads(event.to_json()) == sent


def test_a_code_that_is_no_text_is_no_code() -> None:
    sent = json.loads(examples.unfinished("failed").to_json())
    sent["data"]["error"]["code"] = 7
    with pytest.raises(ValueError, match=r"error\.code"):
        read_event(sent)


def test_words_and_limits_of_the_next_version_in_a_manifest_are_kept_as_they_are() -> None:
    sent = json.loads(examples.completed().to_json())
    sent["data"]["lm"]["backend"] = "sglang"
    wider = {"task_type": "cover-nofsq", "audio_format": "m4a", "batch_size": 5_000, "time_signature": "5"}
    sent["data"]["request"] |= wider
    event = read_event(sent)
    assert event.state == "completed"
    assert event.data.lm is not None
    assert str(event.data.lm.backend) == "sglang"
    request = event.data.request.model_dump(mode="json", warnings=False)
    assert {name: request[name] for name in wider} == wider
    assert request["prompt"] == sent["data"]["request"]["prompt"]
    assert json.loads(event.to_json()) == sent


@pytest.mark.parametrize("kind", ["acestep.job.completed.v2", "acestep.job.paused.v1"])
def test_a_kind_of_event_that_is_not_known_is_an_error_and_no_other_event(kind: str) -> None:
    with pytest.raises(ValueError, match="type"):
        read_event({**json.loads(examples.completed().to_json()), "type": kind})
