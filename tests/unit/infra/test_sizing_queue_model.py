# SPDX-License-Identifier: Apache-2.0
"""The simulated line against what queueing theory knows exactly, and against small cases done by hand."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.sizing.queue_model import Request, replay

MANY = 100_000


def stream(rate: float, mean_s: float, *, fixed: bool = False, count: int = MANY, seed: int = 7) -> list[Request]:
    """Poisson arrivals; exponential times, or fixed ones."""
    chance, now, requests = random.Random(seed), 0.0, []  # noqa: S311 - no secret
    for _ in range(count):
        now += chance.expovariate(rate)
        requests.append(Request(now, mean_s if fixed else chance.expovariate(1 / mean_s)))
    return requests


def erlang_c(slots: int, load: float) -> float:
    """Share of requests that wait, in M/M/c without a limit."""
    terms = [load**k / math.factorial(k) for k in range(slots)]
    last = load**slots / math.factorial(slots) * slots / (slots - load)
    return last / (sum(terms) + last)


def refusal_share(slots: int, limit: int, load: float) -> float:
    """Share of requests that are refused, in M/M/c/c+limit."""
    terms = [load**k / math.factorial(k) for k in range(slots + 1)]
    terms += [terms[slots] * (load / slots) ** k for k in range(1, limit + 1)]
    return terms[-1] / sum(terms)


@pytest.mark.parametrize(("slots", "load"), [(1, 0.7), (2, 1.5), (8, 6.4)])
def test_waits_are_those_of_erlangs_formula(slots: int, load: float) -> None:
    run = replay(stream(rate=load, mean_s=1), slots, limit=10**9)
    waiting = erlang_c(slots, load)
    assert sum(wait > 0 for wait in run.waits_s) / MANY == pytest.approx(waiting, rel=0.04)
    assert run.mean_wait_s == pytest.approx(waiting / (slots - load), rel=0.08)
    assert run.utilisation == pytest.approx(load / slots, rel=0.02)
    # The tail too: a wait is longer than t with probability C exp(-(c - a) t).
    p95 = math.log(waiting / 0.05) / (slots - load)
    assert run.wait_s(0.95) == pytest.approx(p95, rel=0.08)


@pytest.mark.parametrize(("slots", "limit", "load"), [(1, 0, 0.8), (1, 3, 0.9), (4, 0, 3.0), (4, 10, 4.5)])
def test_refusals_are_those_of_the_formula_with_a_limit(slots: int, limit: int, load: float) -> None:
    run = replay(stream(rate=load, mean_s=1), slots, limit)
    assert run.refused / MANY == pytest.approx(refusal_share(slots, limit, load), rel=0.05)
    assert len(run.waits_s) + run.refused == MANY
    assert run.longest_queue == limit


def test_jobs_that_all_take_the_same_wait_half_as_long() -> None:
    """M/D/1: the mean wait is load / (2 (1 - load)) of a service time; with exponential times it is twice that."""
    run = replay(stream(rate=0.8, mean_s=1, fixed=True), 1, limit=10**9)
    assert run.mean_wait_s == pytest.approx(0.8 / (2 * 0.2), rel=0.08)


def test_a_small_case_by_hand() -> None:
    requests = [Request(0, 10), Request(1, 10), Request(2, 3), Request(3, 1), Request(10.5, 1)]
    run = replay(requests, slots=2, limit=1)
    # Two are served at once, the third waits for 8 s, the fourth finds one waiting, and the last a free slot.
    assert list(run.waits_s) == [0, 0, 0.5, 8]
    assert run.refused == 1
    assert run.longest_queue == 1
    assert (run.busy_s, run.lasted_s) == (24, 13)
    assert run.utilisation == pytest.approx(24 / 26)


def test_nothing_to_do_takes_no_time() -> None:
    run = replay([], slots=3, limit=5)
    assert (run.utilisation, run.mean_wait_s, run.wait_s(0.99), run.refused) == (0, 0, 0, 0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="order"):
        replay([Request(2, 1), Request(1, 1)], 1, 1)
    with pytest.raises(ValueError, match="slot"):
        replay([], 0, 1)


@settings(deadline=None)  # a busy machine is no fault
@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 20)), max_size=60),
    st.integers(1, 5),
    st.integers(0, 5),
)
def test_any_stream_is_accounted_for_and_never_overfills_the_queue(
    steps: list[tuple[float, float]], slots: int, limit: int
) -> None:
    now, requests = 0.0, []
    for gap, takes in steps:
        now += gap
        requests.append(Request(now, takes))
    run = replay(requests, slots, limit)
    assert len(run.waits_s) + run.refused == len(requests)
    assert run.longest_queue <= limit
    assert 0 <= run.utilisation <= 1 + 1e-9
    assert run.waits_s == tuple(sorted(run.waits_s))
    assert replay(requests, slots + 1, limit).mean_wait_s <= run.mean_wait_s + 1e-9 or run.refused
