# SPDX-License-Identifier: Apache-2.0
"""Events tell their state in one way, which type checkers can follow."""

from typing import assert_type, get_args

import pytest

from acestep_schemas import examples
from acestep_schemas.events import (
    Audio,
    CloudEvent,
    Completed,
    ErrorReport,
    JobCompleted,
    JobEvent,
    JobProgress,
    JobState,
    TerminalEvent,
    Unfinished,
    WorkerEvent,
    parse_event,
)

JOB_EVENTS = [event for event in examples.events().values() if isinstance(event, JobEvent)]


@pytest.mark.parametrize("event", JOB_EVENTS, ids=lambda event: type(event).__name__)
def test_an_events_state_is_the_one_in_its_type_and_routing_key(event: JobEvent) -> None:
    assert event.type == f"acestep.job.{event.state}.v1"
    assert event.routing_key == f"job.{event.state}.{event.subject}"
    assert event.terminal == JobState(event.state).terminal == isinstance(event, TerminalEvent)


def test_there_is_an_event_for_each_state() -> None:
    assert [event.state for event in JOB_EVENTS] == list(JobState)


def test_a_workers_event_has_a_state_too_and_ends_no_job() -> None:
    event = examples.worker()
    assert (event.state, event.terminal, event.type) == ("ready", False, "acestep.worker.ready.v1")


@pytest.mark.parametrize("kind", get_args(TerminalEvent))
def test_the_data_of_a_terminal_event_has_the_events_state_whatever_its_status(kind: type[CloudEvent]) -> None:
    event = examples.events()[kind]
    assert isinstance(event, TerminalEvent)
    assert event.data.state == event.state


def test_the_state_is_not_sent_for_the_type_says_it() -> None:
    sent = examples.completed().model_dump()
    assert "state" not in sent | sent["data"]
    assert sent["data"]["status"] == "succeeded"


@pytest.mark.parametrize("event", examples.events().values(), ids=lambda event: type(event).__name__)
def test_comparing_the_state_narrows_the_event_and_its_data(event: CloudEvent) -> None:
    """What is narrowed to is checked by mypy, which reads this file like any other."""
    found = parse_event(event.to_json())
    if found.state == "completed":
        assert_type(found, JobCompleted)
        assert_type(found.data.audios, tuple[Audio, ...])
    elif found.state == "progress":
        assert_type(found, JobProgress)
    elif found.state in ("failed", "rejected", "cancelled", "expired"):
        assert_type(found.data, Unfinished)
        assert_type(found.data.error, ErrorReport)
    if found.terminal:
        assert_type(found.data, Completed | Unfinished)
    match found.state:
        case "completed":
            assert_type(found.data, Completed)
        case "ready" | "draining" | "stopped":
            assert_type(found, WorkerEvent)
