# SPDX-License-Identifier: Apache-2.0
"""The soak's audit: silent when every promise was kept, and each broken one is found and named."""

import json
from typing import Any

import pytest

from tests.soak.audit import Evidence, audit, names_of
from tests.soak.load import Sort, Submission
from tests.support.event_recorder import RecordedEvent

AUDIO = {"uri": "s3://b/soak/a/0.wav", "bytes": 1, "sha256": "00"}


def sent(task_id: str = "a", sort: Sort = Sort.SONG, **counts: int) -> dict[str, Submission]:
    counts = {"confirmed": 0, "refused": 0, "unknown": 0} | (counts or {"confirmed": 1})
    confirmed, refused, unknown = counts["confirmed"], counts["refused"], counts["unknown"]
    return {task_id: Submission(task_id, sort, 0.0, confirmed=confirmed, refused=refused, unknown=unknown)}


def owed(sort: Sort) -> dict[str, Submission]:
    submissions = sent(sort=sort, confirmed=2)
    submissions["a"].songs_owed = True
    return submissions


def end(state: str = "completed", task_id: str = "a", *, code: str = "internal_error", note: str = "") -> RecordedEvent:
    data: dict[str, Any] = {"task_id": task_id, "note": note}
    data |= {"audios": [AUDIO]} if state == "completed" else {"error": {"code": code, "message": ""}}
    return RecordedEvent(state, task_id, json.dumps({"data": data}).encode(), 1.0)


def rules(**evidence: Any) -> list[str]:
    return [finding.rule for finding in audit(Evidence(**{"submissions": sent(), "events": [end()], **evidence}))]


def test_a_job_that_ended_well_is_no_finding() -> None:
    assert rules() == []


def test_an_end_that_was_told_twice_in_the_same_bytes_is_no_finding() -> None:
    assert rules(events=[end("started"), end(), end()]) == []


@pytest.mark.parametrize(
    ("sort", "state", "dead"),
    [
        (Sort.INVALID, "rejected", ["a"]),
        (Sort.DEADLY, "failed", ["a"]),
        (Sort.EXPIRING, "expired", ["a"]),
        (Sort.EXPIRING, "completed", []),
        (Sort.CANCELLED, "cancelled", []),
        (Sort.CANCELLED, "completed", []),
        (Sort.WITHOUT_ID, "completed", []),
        (Sort.REUSED_ID, "completed", []),
        (Sort.WORSE_DUPLICATE, "completed", ["a"]),
        (Sort.AUDIO_DELETED, "completed", []),
        (Sort.CUT_OFF, "completed", ["a"]),
        (Sort.CUT_OFF, "expired", ["a"]),
    ],
)
def test_each_sort_of_request_may_end_as_it_should(sort: Sort, state: str, dead: list[str]) -> None:
    assert rules(submissions=sent(sort=sort), events=[end(state)], dead=dead) == []


def test_a_job_whose_engine_was_killed_too_often_is_no_finding() -> None:
    assert rules(events=[end("failed", code="engine_crashed")], dead=["a"]) == []


def test_a_task_that_failed_and_was_sent_again_may_end_twice() -> None:
    twice = sent(sort=Sort.TWICE, confirmed=2)
    assert rules(submissions=twice, events=[end("failed", code="engine_crashed"), end()], dead=["a"]) == []


@pytest.mark.parametrize(
    ("rule", "evidence"),
    [
        ("accepted, and never ended", {"events": []}),
        ("started, and never ended", {"events": [end("started", task_id="a-first-id"), end()]}),
        ("refused, and run all the same", {"submissions": sent(refused=1)}),
        ("ended, and nobody sent it", {"submissions": {}}),
        ("ended in more than one way", {"events": [end(), end(note="other bytes")]}),
        ("ended in more than one way", {"submissions": sent(sort=Sort.EXPIRING), "events": [end(), end("expired")]}),
        (
            "ended in more than one way",
            {"submissions": sent(sort=Sort.TWICE, confirmed=2), "events": [end(), end(note="other bytes")]},
        ),
        ("ended as it must not", {"events": [end("failed")], "dead": ["a"]}),
        ("ended as it must not", {"submissions": sent(sort=Sort.INVALID)}),
        (
            "ended in more than one way",
            {"submissions": sent(sort=Sort.WITHOUT_ID), "events": [end(), end(note="2"), end(note="3")]},
        ),
        (
            "ended in more than one way",
            {"submissions": sent(sort=Sort.AUDIO_DELETED), "events": [end(), end(note="2")]},
        ),
        (
            "lost its songs to another message with its id",
            {"submissions": owed(sort=Sort.WORSE_DUPLICATE), "events": [end("expired")]},
        ),
        (
            "lost its songs to another message with its id",
            {"submissions": owed(sort=Sort.REUSED_ID), "events": [end("cancelled")]},
        ),
        ("completed, and not in the bucket as the event says", {"wrongs": {"a": ["missing: 0.wav"]}}),
        ("failed or rejected, and no dead letter", {"events": [end("failed", code="engine_crashed")]}),
        ("completed, and a dead letter", {"dead": ["a"]}),
        ("messages left on the broker", {"ready": 1}),
        ("messages that nobody settled", {"unacked": 1}),
        ("left in a scratch folder", {"leftovers": ["worker-1/scratch/x"]}),
        ("a worker left in a way that it must not", {"exits": {0: 1, -9: 3, 1: 1}}),
    ],
)
def test_a_broken_promise_is_found_and_named(rule: str, evidence: dict[str, Any]) -> None:
    assert rule in rules(**evidence)


def test_the_broker_may_give_up_a_request_with_an_expiration_that_a_worker_has_not_acknowledged() -> None:
    assert rules(submissions=sent(sort=Sort.EXPIRING), dead=["a"]) == []


def test_deleted_songs_may_be_made_again() -> None:
    twice = sent(sort=Sort.AUDIO_DELETED, confirmed=2)
    assert rules(submissions=twice, events=[end(), end(note="again")]) == []


def test_garbage_under_an_id_may_be_rejected_before_the_songs_come() -> None:
    twice = sent(sort=Sort.WORSE_DUPLICATE, confirmed=2)
    assert rules(submissions=twice, events=[end("rejected"), end()], dead=["a"]) == []


def test_a_message_without_an_id_is_recognised_by_its_prompt() -> None:
    done = end(task_id="x", note="takes=1 name=soak-00007")
    dead = ("y", b'{"prompt": "name=soak-00008 crash"}')
    assert names_of([done, end("failed", task_id="y")], [dead]) == {"x": "soak-00007", "y": "soak-00008"}


def test_a_finding_names_the_task() -> None:
    (finding,) = audit(Evidence(submissions=sent("lost"), events=[]))
    assert finding.ids == ("lost",)


def test_a_message_that_expired_while_its_worker_was_cut_off_has_one_end() -> None:
    events = [end("expired"), end()]
    assert rules(submissions=sent(sort=Sort.CUT_OFF), events=events, dead=["a"]) == ["ended in more than one way"]
