# SPDX-License-Identifier: Apache-2.0
"""Estimates: learned from jobs, and honest about what was never seen."""

import random
from statistics import median
from typing import Any

import pytest

from acestep_consumer.domain.job import Job
from acestep_consumer.execution.eta import CostModel, Estimate, RecencyWeightedFit
from tests.support.jobs import make_job


def job(seconds: float | None, **fields: Any) -> Job:
    return make_job(audio_duration=seconds, **fields)


def learn(costs: CostModel, seconds: float, took_s: float) -> None:
    costs.learn(job(seconds), seconds, took_s)


def test_what_was_never_seen_has_no_estimate() -> None:
    costs = CostModel()
    learn(costs, 60, 5.0)
    assert costs.expect(job(60, inference_steps=50)).expected_s is None
    assert CostModel().seconds_per_job is None


def test_one_job_is_enough_for_the_next_of_its_kind() -> None:
    costs = CostModel()
    learn(costs, 60, 5.0)
    assert costs.expect(job(60)).expected_s == pytest.approx(5.0)
    longer = costs.expect(job(120)).expected_s
    assert longer is not None
    assert 5.0 < longer <= 10.0


def test_a_fixed_cost_and_a_cost_per_second_are_told_apart() -> None:
    costs = CostModel()
    for seconds in (30, 60, 120, 240, 30, 240):
        learn(costs, seconds, 2.0 + 0.05 * seconds)
    assert costs.expect(job(180)).expected_s == pytest.approx(11.0)
    assert costs.expect(job(90, batch_size=2)).expected_s == pytest.approx(11.0)


def test_a_worker_that_grew_slower_is_believed_after_some_jobs() -> None:
    costs = CostModel()
    for took in (*[5.0] * 50, *[15.0] * 50):
        learn(costs, 60, took)
    assert costs.expect(job(60)).expected_s == pytest.approx(15.0, rel=0.1)
    assert costs.seconds_per_job == pytest.approx(15.0, rel=0.1)


def test_with_noise_of_a_fifth_the_median_error_is_below_a_quarter() -> None:
    dice, costs, errors = random.Random(4), CostModel(), []  # noqa: S311 - not a secret
    for _ in range(200):
        seconds = dice.uniform(10, 300)
        took = (1 + 0.03 * seconds) * dice.uniform(0.8, 1.2)
        expected = costs.expect(job(seconds)).expected_s
        errors += [] if expected is None else [abs(expected - took) / took]
        learn(costs, seconds, took)
    assert median(errors[50:]) < 0.25


def test_a_job_whose_length_the_planner_decides_is_expected_to_be_like_the_others() -> None:
    costs = CostModel()
    for seconds, took in ((30, 3.0), (90, 9.0)):
        learn(costs, seconds, took)
    assert costs.expect(job(None)).expected_s == pytest.approx(6.0, rel=0.1)


def test_no_line_falls_or_goes_below_zero() -> None:
    line = RecencyWeightedFit()
    for x, y in ((10, 5.0), (20, 1.0), (30, 0.5)):
        line.add(x, y)
    assert line.at(1000) >= 0
    assert line.at(0) <= line.at(1000)


def test_what_remains_goes_from_what_is_usual_to_what_this_job_shows() -> None:
    now = [0.0]
    estimate = Estimate(10.0, lambda: now[0])
    assert estimate.remaining_s(0.0) == pytest.approx(10.0)
    now[0] = 9.0
    assert estimate.remaining_s(0.5) == pytest.approx(0.5 * 1.0 + 0.5 * 9.0)
    # Longer than usual: the rest is as long as its own pace says.
    now[0] = 19.0
    assert estimate.remaining_s(0.95) == pytest.approx(1.0)


def test_without_an_estimate_progress_alone_tells_once_there_is_some() -> None:
    now = [0.0]
    estimate = Estimate(None, lambda: now[0])
    now[0] = 2.0
    assert estimate.remaining_s(0.05) is None
    assert estimate.remaining_s(0.5) == pytest.approx(2.0)


def test_a_job_that_takes_longer_than_usual_and_shows_no_progress_has_an_unknown_rest() -> None:
    now = [0.0]
    estimate = Estimate(6.8, lambda: now[0])
    now[0] = 180.0
    assert estimate.remaining_s(0.0) is None
    assert estimate.remaining_s(0.5) == pytest.approx(180.0)


def test_the_rest_of_each_running_job_is_known_the_shortest_first_and_the_unknown_last() -> None:
    costs, now = CostModel(), [0.0]
    late, early, unknown = (Estimate(expected_s, lambda: now[0]) for expected_s in (50.0, 20.0, None))
    with costs.running(unknown), costs.running(late), costs.running(early):
        assert costs.remaining_s == (20.0, 50.0, None)
        now[0], late.progress = 10.0, 0.5
        assert costs.remaining_s == (10.0, 0.5 * 40 + 0.5 * 10, None)
    assert not costs.remaining_s


def test_two_long_jobs_among_many_short_ones_do_not_make_the_mean_a_long_one() -> None:
    costs = CostModel()
    for took_s in (*[2.0] * 198, *[120.0] * 2):
        learn(costs, 60, took_s)
    assert costs.seconds_per_job is not None
    assert costs.seconds_per_job < 7
