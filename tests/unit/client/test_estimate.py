# SPDX-License-Identifier: Apache-2.0
"""Place and waiting time of a request, and when a refused producer should try again."""

from typing import Any

import pytest

from acestep_consumer.client.estimate import (
    GUESS_S,
    LONGEST_S,
    NO_WORKER_S,
    SHORTEST_S,
    QueueEstimate,
    RequestQueueDepth,
    RetryAfter,
    WorkerLoad,
    estimate,
    expected,
)
from acestep_schemas import examples
from acestep_schemas.events import JobCompleted, Timings, Worker


def worker(worker_id: str = "w1", **fields: Any) -> Worker:
    """A worker that runs one job at a time, a minute each."""
    fields_set = {"state": "ready", "prefetch": 1, "in_hand": 1, "seconds_per_job": 60.0}
    return Worker(worker_id=worker_id, models=("m",), tier="tier6", vram_gb=24, **{**fields_set, **fields})


def load(worker_id: str = "w1", **fields: Any) -> WorkerLoad:
    return WorkerLoad.of(worker(worker_id, **fields))


def outlook(ready: int, *answers: Worker, consumers: int | None = None, **others: Any) -> QueueEstimate:
    depth = RequestQueueDepth(ready=ready, consumers=len(answers) if consumers is None else consumers)
    return estimate(depth, answers, others.get("job_s"), others.get("problem"))


def test_a_request_that_runs_already_takes_as_long_as_a_job() -> None:
    assert outlook(0, worker()) == QueueEstimate(position=0, in_hand=1, workers=1, expected_s=60)


@pytest.mark.parametrize(("position", "expected_s"), [(1, 30 + 60), (2, 90 + 60), (10, 570 + 60)])
def test_one_job_at_a_time_the_queue_moves_on_once_a_job(position: int, expected_s: float) -> None:
    """The running job is half done, on average."""
    assert expected(position, [load()], None) == pytest.approx(expected_s)


def test_jobs_side_by_side_end_as_often_as_their_seconds_over_the_prefetch_say() -> None:
    """Four that take 60 s beside each other end one in 15 s; that they share a card is in the 60 s already."""
    assert expected(4, [load(prefetch=4, in_hand=4)], None) == pytest.approx(3.5 * 15 + 60)


def test_a_free_slot_takes_a_request_at_once() -> None:
    idle = load(prefetch=4, in_hand=2)
    assert expected(1, [idle], None) == expected(2, [idle], None) == pytest.approx(60)
    # The two that run are a quarter and three quarters on their way.
    assert expected(3, [idle], None) == pytest.approx(0.25 * 60 + 60)


def test_all_workers_move_the_queue_and_the_quicker_ones_more_of_it() -> None:
    quick, slow = load("a", seconds_per_job=20.0), load("b", seconds_per_job=60.0)
    ends_a_second = 1 / 20 + 1 / 60
    # Three of four jobs are the quick one's, and a job takes 30 s in the mean over those.
    assert expected(0, [quick, slow], None) == pytest.approx(30)
    assert expected(8, [quick, slow], None) == pytest.approx(7.5 / ends_a_second + 30, rel=0.2)
    assert expected(80, [quick, slow], None) == pytest.approx(79.5 / ends_a_second + 30, rel=0.02)


def test_a_worker_that_has_learned_nothing_yet_is_taken_to_be_like_the_others() -> None:
    new = load("b", seconds_per_job=None)
    assert expected(2, [load(), new], None) == expected(2, [load(), load("b")], None)


def test_the_clients_own_figure_is_used_where_no_worker_has_one() -> None:
    assert expected(0, [load(seconds_per_job=None)], 12.0) == pytest.approx(12)
    assert expected(0, [load(seconds_per_job=20.0)], 12.0) == pytest.approx(20)


def test_more_wait_longer_and_more_workers_make_it_shorter() -> None:
    waits = [expected(position, [load(prefetch=3, in_hand=3)], None) or 0 for position in range(20)]
    assert waits == sorted(set(waits))
    crews = [expected(20, [load(str(number)) for number in range(count)], None) or 0 for count in range(1, 9)]
    assert crews == sorted(set(crews), reverse=True)


def test_a_running_job_counts_with_what_it_still_needs_and_not_with_half_of_the_usual() -> None:
    """Its age and its length are in the worker's own estimate."""
    assert expected(1, [load(remaining_s=(3.0,))], None) == pytest.approx(3 + 60)
    assert expected(1, [load(remaining_s=(500.0,))], None) == pytest.approx(500 + 60)
    assert expected(2, [load(prefetch=2, in_hand=2, remaining_s=(3.0, 500.0))], None) == pytest.approx(63 + 60)
    # One of two has not begun: it is half done at most.
    assert expected(1, [load(prefetch=2, in_hand=2, remaining_s=(500.0,))], None) == pytest.approx(30 + 60)


def test_nobody_knows_when_a_job_ends_that_takes_longer_than_any() -> None:
    stuck = worker(seconds_per_job=6.8, remaining_s=(None,))
    found = outlook(4, stuck)
    assert (found.expected_s, found.position) == (None, 4)
    assert "the running jobs take longer" in (found.note or "")
    # Another worker takes them all.
    assert outlook(4, stuck, worker("b", in_hand=0, seconds_per_job=10.0, remaining_s=())).expected_s == 40


def test_a_worker_whose_prefetch_became_smaller_takes_nothing_for_the_first_jobs_that_end() -> None:
    shrunk = load(prefetch=1, in_hand=3, remaining_s=(1.0, 2.0, 30.0))
    assert expected(1, [shrunk], None) == pytest.approx(30 + 60)


def test_an_estimate_is_in_whole_seconds() -> None:
    found = outlook(7, worker(prefetch=3, in_hand=3, seconds_per_job=1.234, remaining_s=(0.1, 0.2, 0.3)))
    assert isinstance(found.expected_s, int)
    assert found.expected_s == 4


def test_a_worker_that_drains_takes_nothing_and_its_jobs_still_run() -> None:
    found = outlook(1, worker(), worker("b", state="draining", in_hand=3), consumers=1)
    assert found == QueueEstimate(position=1, in_hand=4, workers=1, expected_s=90)


@pytest.mark.parametrize(
    ("found", "note"),
    [
        (estimate(None, (), None), "did not answer in time"),
        (estimate(None, (), None, "it is gone"), "it is gone"),
        (outlook(1), "acestep-consumer run"),
        (outlook(1, consumers=2), "no worker answered in time"),
        (outlook(1, consumers=2, problem="not allowed"), "not allowed"),
        (outlook(1, worker(seconds_per_job=None)), "no worker has finished a job yet"),
        (outlook(1, worker(remaining_s=(None,))), "unknown when"),
    ],
)
def test_an_unknown_figure_is_not_guessed_and_the_note_says_why(found: QueueEstimate, note: str) -> None:
    assert found.expected_s is None
    assert note in (found.note or "")


def test_a_figure_without_those_who_did_not_answer_says_so() -> None:
    found = outlook(1, worker(), consumers=3)
    assert found.expected_s == 90
    assert "1 answered for 3 consumers" in (found.note or "")


@pytest.fixture
def no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: low)


def took(total: float | None) -> JobCompleted:
    event = examples.completed()
    data = event.data.model_copy(update={"timings": Timings(queued=1000.0, total=total)})
    return event.model_copy(update={"data": data})


def learned(*totals: float | None) -> RetryAfter:
    retry = RetryAfter()
    for total in totals:
        retry.learn(took(total))
    return retry


@pytest.mark.usefixtures("no_spread")
def test_before_any_job_has_ended_a_retry_is_a_guess() -> None:
    assert learned().retry_after(3) == learned(None).retry_after(None) == GUESS_S


@pytest.mark.usefixtures("no_spread")
def test_a_retry_learns_nothing_from_other_events() -> None:
    retry = RetryAfter()
    for event in (examples.started(), examples.progress(), examples.unfinished("failed")):
        retry.learn(event)
    assert retry.retry_after(1) == GUESS_S


@pytest.mark.usefixtures("no_spread")
@pytest.mark.parametrize(("workers", "wait"), [(1, 60.0), (4, 15.0), (None, 60.0)])
def test_a_retry_is_after_a_jobs_time_over_the_number_of_workers(workers: int | None, wait: float) -> None:
    assert learned(60.0).retry_after(workers) == wait


@pytest.mark.usefixtures("no_spread")
def test_a_retry_is_learned_from_workers_announcements_too() -> None:
    event = examples.worker()
    retry = RetryAfter()
    retry.learn(event.model_copy(update={"data": event.data.model_copy(update={"seconds_per_job": 44.0})}))
    assert retry.retry_after(2) == 22


@pytest.mark.usefixtures("no_spread")
def test_without_a_worker_a_retry_is_after_a_workers_start() -> None:
    assert learned(60.0).retry_after(0) == NO_WORKER_S


@pytest.mark.usefixtures("no_spread")
def test_a_retry_stays_within_bounds() -> None:
    assert learned(0.01).retry_after(8) == SHORTEST_S
    assert learned(1e6).retry_after(1) == LONGEST_S


@pytest.mark.usefixtures("no_spread")
def test_a_retry_follows_a_workload_that_changes() -> None:
    assert learned(100.0, *[10.0] * 50).retry_after(1) == pytest.approx(10, rel=0.1)
