# SPDX-License-Identifier: Apache-2.0
"""When a refused producer should try again."""

import pytest

from acestep_consumer.client.retry_after import GUESS_S, LONGEST_S, NO_WORKER_S, SHORTEST_S, RetryAfter
from acestep_schemas import examples
from acestep_schemas.events import JobCompleted, Timings


@pytest.fixture(autouse=True)
def no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: low)


def took(total: float | None) -> JobCompleted:
    event = examples.completed()
    data = event.data.model_copy(update={"timings": Timings(queued=1000.0, total=total)})
    return event.model_copy(update={"data": data})


def heard(*totals: float | None) -> RetryAfter:
    pace = RetryAfter()
    for total in totals:
        pace.hear(took(total))
    return pace


def test_before_anything_is_heard_it_is_a_guess() -> None:
    assert heard().retry_after(3) == heard(None).retry_after(None) == GUESS_S


def test_other_events_teach_nothing() -> None:
    pace = RetryAfter()
    for event in (examples.started(), examples.progress(), examples.unfinished("failed")):
        pace.hear(event)
    assert pace.retry_after(1) == GUESS_S


@pytest.mark.parametrize(("workers", "wait"), [(1, 60.0), (4, 15.0), (None, 60.0)])
def test_it_is_a_jobs_time_over_the_number_of_workers(workers: int | None, wait: float) -> None:
    assert heard(60.0).retry_after(workers) == wait


def test_it_is_learned_from_what_a_worker_announces_too() -> None:
    event = examples.worker()
    pace = RetryAfter()
    pace.hear(event.model_copy(update={"data": event.data.model_copy(update={"seconds_per_job": 44.0})}))
    assert pace.retry_after(2) == 22


def test_without_a_worker_it_is_what_a_worker_takes_to_start() -> None:
    assert heard(60.0).retry_after(0) == NO_WORKER_S


def test_it_stays_within_bounds() -> None:
    assert heard(0.01).retry_after(8) == SHORTEST_S
    assert heard(1e6).retry_after(1) == LONGEST_S


def test_it_follows_a_workload_that_changes() -> None:
    assert heard(100.0, *[10.0] * 50).retry_after(1) == pytest.approx(10, rel=0.1)
