# SPDX-License-Identifier: Apache-2.0
"""Answers of workers as they come: of newer versions too, and what is no answer."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from acestep_consumer.client.worker_survey import _parsed
from acestep_schemas import examples
from acestep_schemas.events import WorkerEvent


def answer(**fields: Any) -> Any:
    body = json.loads(examples.worker().to_json())
    return SimpleNamespace(body=json.dumps({**body, "data": {**body["data"], **fields}}).encode())


def test_a_newer_workers_answer_counts_without_what_this_version_does_not_know() -> None:
    found = _parsed(answer(in_hand=7, mood="fine"))
    assert isinstance(found, WorkerEvent)
    assert found.data.in_hand == 7


def test_an_older_workers_answer_says_nothing_of_what_remains() -> None:
    body = json.loads(answer().body)
    del body["data"]["remaining_s"]
    found = _parsed(SimpleNamespace(body=json.dumps(body).encode()))  # type: ignore[arg-type]  # all that is read
    assert isinstance(found, WorkerEvent)
    assert found.data.remaining_s is None


@pytest.mark.parametrize("body", [b"{", b"[]", examples.started().to_json()])
def test_anything_else_is_no_answer(body: bytes) -> None:
    assert _parsed(SimpleNamespace(body=body)) is None  # type: ignore[arg-type]  # as above
