# SPDX-License-Identifier: Apache-2.0
"""Requests in envelopes: opened where exactly one holds a request; else it is said what was seen."""

import pytest

from acestep_schemas.envelope import open_envelope

SONG = {"prompt": "jazz"}


@pytest.mark.parametrize(
    "body",
    [SONG, {"param_obj": SONG}, {"caption": "jazz", "input": SONG}, {"key": "Am"}, {"metas": "{}"}],
)
def test_a_body_with_a_field_of_a_request_is_the_request(body: dict[str, object]) -> None:
    found = open_envelope(body)
    assert (found.fields, found.warnings, found.problem) == (body, (), None)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("input", {"id": "7", "input": SONG}),
        ("data", {"specversion": "1.0", "id": "7", "source": "/shop", "type": "song.wanted", "data": SONG}),
        ("message", {"messageId": "7", "messageType": ["urn:message:Songs:Wanted"], "headers": {}, "message": SONG}),
        ("data", {"input": {"unknown": 1}, "data": SONG}),
    ],
    ids=["serverless", "CloudEvents", "MassTransit", "one of two"],
)
def test_the_one_envelope_that_holds_a_request_is_opened_with_a_warning(name: str, body: dict[str, object]) -> None:
    found = open_envelope(body)
    assert (found.fields, found.problem) == (SONG, None)
    assert found.warnings == (f"the request was read from '{name}', the body's envelope",)


def test_fields_that_say_nothing_of_the_music_count_beside_an_envelope() -> None:
    body = {"task_id": "order-1", "model": "turbo", "key": "user-7", "metadata": {"trace": "1"}, "data": SONG}
    found = open_envelope(body)
    assert found.fields == {"task_id": "order-1", "model": "turbo", **SONG}
    assert found.warnings == ("the request was read from 'data', the body's envelope; 'key' beside it is ignored",)
    inside = open_envelope({"task_id": "order-1", "input": {**SONG, "task_id": "order-2"}})
    assert inside.fields["task_id"] == "order-2"


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        ({}, "an empty object"),
        ({"text": "jazz", "n": 1}, "an object with text, n"),
        ({"input": "jazz"}, "an object with input"),
        ({"task_id": "t", "model": "turbo", "params": SONG}, "an object with task_id, model, params"),
        ({"metadata": {"trace": "1"}, "payload": SONG}, "an object with metadata, payload"),
        ({"param_obj": {}, "message": {"model": "turbo"}}, "an object with param_obj, message"),
        ({"data": {"data": SONG}}, "an object with data"),
        ({f"k{number}": 1 for number in range(99)}, "an object with k0, k1, k2, k3, k4, k5, k6, k7, k8, k9"),
    ],
)
def test_a_body_without_a_request_is_refused_with_what_was_seen(body: dict[str, object], seen: str) -> None:
    problem = open_envelope(body).problem
    assert problem is not None
    assert (problem.field, problem.value) == ("body", seen)
    assert problem.rule == "must have a field of a request, such as prompt, or hold it in input, data or message"


def test_two_requests_in_one_body_are_refused() -> None:
    problem = open_envelope({"input": SONG, "data": SONG}).problem
    assert problem is not None
    assert problem.rule == "must hold one request, not one each in input and data"
