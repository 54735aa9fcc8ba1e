# SPDX-License-Identifier: Apache-2.0
"""Places of waiting jobs, the time until their songs, and what is known of the workers."""

from datetime import UTC, datetime, timedelta

from acestep_consumer.client.estimate import WorkerLoad
from acestep_consumer.webui.waiting import FORGET_AFTER, WaitingPlaces, WorkerRegister, WorkersView
from acestep_schemas import examples
from acestep_schemas.events import LmChoice, Worker

ONE_WORKER = [WorkerLoad(prefetch=1, in_hand=1, seconds_per_job=10.0, remaining_s=(4.0,))]
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def places(waiting: WaitingPlaces) -> dict[str, int]:
    return {task_id: each.place for task_id, each in waiting.shown([], None).items()}


def worker(worker_id: str = "w", **data: object) -> Worker:
    return examples.worker().data.model_copy(update={"worker_id": worker_id, "state": "ready"} | data)


def test_jobs_move_up_when_one_before_them_leaves_the_queue() -> None:
    waiting = WaitingPlaces()
    waiting.add("third", 3)
    waiting.add("fifth", 5)
    waiting.advance("of somebody else", begun=False)
    assert places(waiting) == {"third": 2, "fifth": 4}
    waiting.advance("third", begun=False)
    assert places(waiting) == {"fifth": 3}
    waiting.advance("third", begun=True)  # its later events say nothing about the queue
    assert places(waiting) == {"fifth": 3}


def test_a_job_that_leaves_behind_another_one_does_not_move_it() -> None:
    waiting = WaitingPlaces()
    waiting.add("first", 1)
    waiting.add("second", 2)
    waiting.advance("second", begun=False)  # cancelled, or of a higher priority
    assert places(waiting) == {"first": 1}


def test_no_place_is_beyond_the_length_of_the_queue() -> None:
    waiting = WaitingPlaces()
    waiting.add("far", 40)
    waiting.limit(None)
    waiting.limit(0)
    assert places(waiting) == {"far": 40}
    waiting.limit(6)
    assert places(waiting) == {"far": 6}


def test_the_time_is_that_of_the_jobs_before_it_and_its_own() -> None:
    waiting = WaitingPlaces()
    waiting.add("next", 1)
    waiting.add("third", 3)
    shown = waiting.shown(ONE_WORKER, None)
    assert (shown["next"].expected_s, shown["third"].expected_s) == (14, 34)
    assert waiting.shown([], 10.0)["next"].expected_s is None


def test_whether_a_language_model_is_loaded_is_known_from_the_workers_alone() -> None:
    register = WorkerRegister(lambda: NOW)
    assert register.summary() == WorkersView(lm=None)
    assert register.add(worker("one", models=("turbo",), lm=None))
    assert register.summary() == WorkersView(lm=False, models=("turbo",))
    assert register.add(worker("two", models=("turbo", "base"), lm=LmChoice(model="small", backend="vllm")))
    assert register.summary() == WorkersView(lm=True, models=("turbo", "base"))
    assert not register.add(worker("two", models=("turbo", "base"), lm=LmChoice(model="small", backend="vllm")))
    assert register.add(worker("two", state="stopped"))
    assert register.summary().lm is False


def test_a_worker_that_does_not_answer_any_more_is_forgotten() -> None:
    now = [NOW]
    register = WorkerRegister(lambda: now[0])
    register.add(worker("gone", lm=LmChoice(model="small", backend="vllm")))
    now[0] = NOW + FORGET_AFTER + timedelta(seconds=1)
    register.add(worker("here", lm=None))
    assert register.summary().lm is False
    assert len(register.loads()) == 1
