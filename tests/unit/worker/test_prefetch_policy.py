# SPDX-License-Identifier: Apache-2.0
"""The policy of ``ACESTEP_QUEUE_WORKERS=auto`` against a card that is arithmetic, and against any readings at all."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.worker.prefetch_policy import (
    PrefetchPolicy,
    PrefetchTuning,
    ThroughputSample,
    WorkerSample,
    ladder,
)
from tests.support.simulated_card import SimulatedCard, drive

HOUR_S = 3600.0
SEEDS = [1, 2, 3]


def changes(numbers: list[int]) -> int:
    return sum(before != after for before, after in pairwise(numbers))


def share_at(numbers: list[int], wanted: set[int]) -> float:
    return sum(number in wanted for number in numbers) / len(numbers)


@pytest.mark.parametrize(
    ("most", "rungs"),
    [(1, (1,)), (2, (1, 2)), (5, (1, 2, 3, 4, 5)), (24, (1, 2, 3, 4, 6, 8, 12, 16, 24)), (7, (1, 2, 3, 4, 6, 7))],
)
def test_the_ladder_ends_at_the_maximum(most: int, rungs: tuple[int, ...]) -> None:
    assert ladder(most) == rungs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pack", [6, 8, 16])
def test_it_climbs_to_where_more_brings_nothing_and_stays_there(pack: int, seed: int) -> None:
    card = SimulatedCard(pack=pack, seed=seed)
    concurrency = PrefetchPolicy(2, 64)
    climb = drive(card, concurrency, 900)
    assert climb[0] == 2
    before = card.finished
    stay = drive(card, concurrency, 2 * HOUR_S)
    rate = (card.finished - before) / (2 * HOUR_S)
    assert rate >= 0.97 * card.capacity(64)
    assert share_at(stay, {pack}) >= 0.85
    # Two hours at rest: a few trials of a minute, each there and back.
    assert changes(stay) <= 24


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_does_not_carry_it_away(seed: int) -> None:
    card = SimulatedCard(pack=8, noise=0.15, seed=seed)
    concurrency = PrefetchPolicy(2, 64)
    drive(card, concurrency, 900)
    before = card.finished
    numbers = drive(card, concurrency, 4 * HOUR_S)
    assert (card.finished - before) / (4 * HOUR_S) >= 0.95 * card.capacity(64)
    assert share_at(numbers, {6, 8, 12, 16}) >= 0.95


def test_a_slow_card_is_judged_by_as_many_jobs_as_a_fast_one() -> None:
    """A song takes five seconds beside ten of launch: a measurement lasts minutes."""
    card = SimulatedCard(launch_s=10, song_s=5, pack=6)
    numbers = drive(card, PrefetchPolicy(2, 64), 2 * HOUR_S)
    assert numbers[: int(120 / 2)] == [2] * 60
    assert share_at(numbers[len(numbers) // 2 :], {6}) >= 0.7


def test_it_stays_at_the_start_where_the_second_worker_is_enough() -> None:
    card = SimulatedCard(pack=1)
    numbers = drive(card, PrefetchPolicy(2, 64), HOUR_S)
    assert set(numbers) == {2, 3}
    assert share_at(numbers, {2}) >= 0.9


@pytest.mark.parametrize("arrivals_s", [1.2, 5.0, 600.0])
def test_it_does_not_climb_while_workers_are_idle(arrivals_s: float) -> None:
    card = SimulatedCard(arrivals_s=arrivals_s)
    assert set(drive(card, PrefetchPolicy(2, 64), HOUR_S)) == {2}


def test_a_trial_that_the_queue_cuts_short_is_taken_back() -> None:
    card = SimulatedCard()
    concurrency = PrefetchPolicy(2, 64)
    while concurrency.workers == 2:
        drive(card, concurrency, 2)
    assert (concurrency.workers, concurrency.reason) == (3, "trial")
    card.arrivals_s, card._arrived_s = 60.0, card.now_s
    numbers = drive(card, concurrency, 600)
    assert numbers[-1] == 2
    assert concurrency.reason == "idle"
    card.arrivals_s = None
    assert max(drive(card, concurrency, 600)) > 3


@pytest.mark.parametrize(
    "card",
    [SimulatedCard(memory_gb_each=5.0), SimulatedCard(reduces_above=16)],
    ids=["memory over the bound", "reductions"],
)
def test_it_steps_back_from_a_number_that_memory_does_not_hold_and_stays_below_for_minutes(card: SimulatedCard) -> None:
    concurrency = PrefetchPolicy(2, 64)
    while concurrency.reason != "memory":
        drive(card, concurrency, 2)
    assert concurrency.workers == 16
    assert max(drive(card, concurrency, 296)) == 16
    # Then it is tried again, and the wait is longer each time.
    hours = drive(card, concurrency, 4 * HOUR_S)
    assert max(hours) == 24
    assert share_at(hours, {24}) < 0.01
    assert share_at(hours, {12, 16}) > 0.99


def test_jobs_of_the_larger_number_leave_before_memory_is_judged_again() -> None:
    """Memory is short for as long as they are there; one step back must not become three."""
    habits = PrefetchTuning()
    concurrency = PrefetchPolicy(2, 64, habits)
    card = SimulatedCard()
    while concurrency.workers < 8:
        drive(card, concurrency, 2)
    now, finished = card.now_s, card.finished

    def read(in_hand: int, done: int, memory: float) -> int:
        nonlocal now
        now += 2
        done += finished
        return concurrency.read(
            WorkerSample(now_s=now, finished=done, work=float(done), in_hand=in_hand, memory=memory, reductions=0)
        )

    assert read(8, 0, 0.99) == 6
    assert [read(8 - done, done, 0.99) for done in (0, 1, 2)] == [6, 6, 6]
    assert [read(6, done, 0.98) for done in (3, 4, 5)] == [6, 6, 6]
    assert read(6, 7, 0.97) == 4


def test_memory_that_a_step_back_does_not_lower_is_not_given_way_to() -> None:
    """Weights and caches may fill the card at any number of workers."""
    card = SimulatedCard(memory_gb=97.0, pack=8)
    numbers = drive(card, PrefetchPolicy(2, 64), HOUR_S)
    assert share_at(numbers[len(numbers) // 2 :], {6, 8, 12}) >= 0.95


def test_it_follows_a_workload_that_can_use_more_workers() -> None:
    card = SimulatedCard(pack=4)
    concurrency = PrefetchPolicy(2, 64)
    drive(card, concurrency, HOUR_S)
    assert concurrency.workers in {3, 4, 6}
    card.pack = 24
    drive(card, concurrency, HOUR_S)
    assert concurrency.workers in {16, 24, 32}


def test_it_follows_a_workload_that_needs_fewer_workers() -> None:
    card = SimulatedCard(pack=24)
    concurrency = PrefetchPolicy(2, 64)
    drive(card, concurrency, HOUR_S)
    assert concurrency.workers in {16, 24, 32}
    card.pack, card.song_s, card.launch_s = 4, 1.0, 4.0
    drive(card, concurrency, 3 * HOUR_S)
    assert concurrency.workers in {4, 6, 8}


def test_a_throughput_that_has_clearly_changed_is_looked_into_at_once() -> None:
    card = SimulatedCard(pack=4)
    concurrency = PrefetchPolicy(2, 64)
    drive(card, concurrency, 4 * HOUR_S)  # the waits between trials are at their longest
    home = concurrency.workers
    card.pack, card.launch_s, card.song_s = 32, 0.5, 0.05
    assert max(drive(card, concurrency, 240)) > 2 * home


def test_counters_that_begin_anew_neither_move_it_nor_count_as_throughput() -> None:
    card = SimulatedCard(pack=8)
    concurrency = PrefetchPolicy(2, 64)
    drive(card, concurrency, HOUR_S)
    home = concurrency.workers
    card.finished = card.reductions = 0
    assert set(drive(card, concurrency, 20)) == {home}


@st.composite
def readings(draw: st.DrawFn) -> list[WorkerSample]:
    """Readings in the order of time, mostly with counters that rise, as they may come from any worker."""
    moments = draw(
        st.lists(
            st.tuples(
                st.floats(0, 1000),
                st.integers(-2, 500),
                st.floats(-1, 1e5),
                st.integers(0, 2000),
                st.none() | st.floats(0, 2),
                st.integers(-1, 3),
            ),
            max_size=60,
        )
    )
    now, finished, work, reductions, found = 0.0, 0, 0.0, 0, []
    for after, jobs, worth, in_hand, memory, more in moments:
        now, finished, work, reductions = now + after, max(0, finished + jobs), work + worth, max(0, reductions + more)
        found.append(
            WorkerSample(now_s=now, finished=finished, work=work, in_hand=in_hand, memory=memory, reductions=reductions)
        )
    return found


@given(readings(), st.integers(1, 3), st.integers(1, 1024))
def test_whatever_it_reads_it_stays_on_the_ladder_and_moves_one_step_at_a_time(
    heard: list[WorkerSample], start: int, most: int
) -> None:
    concurrency = PrefetchPolicy(start, most)
    rungs = ladder(most)
    numbers = [concurrency.workers, *map(concurrency.read, heard)]
    assert numbers[0] == min(start, most)
    assert set(numbers) <= set(rungs)
    assert all(abs(rungs.index(before) - rungs.index(after)) <= 1 for before, after in pairwise(numbers))


@given(readings())
def test_without_memory_pressure_it_never_goes_below_its_start(heard: list[WorkerSample]) -> None:
    concurrency = PrefetchPolicy(2, 64)
    for moment in heard:
        calm = WorkerSample(now_s=moment.now_s, finished=moment.finished, work=moment.work, in_hand=moment.in_hand)
        assert concurrency.read(calm) >= 2


@given(readings())
def test_without_running_jobs_it_never_climbs(heard: list[WorkerSample]) -> None:
    concurrency = PrefetchPolicy(2, 64)
    for moment in heard:
        idle = WorkerSample(now_s=moment.now_s, finished=moment.finished, work=moment.work, in_hand=0)
        assert concurrency.read(idle) <= 2


@pytest.mark.parametrize("phase", [0.0, 1.0, 3.0, 5.0])
def test_throughput_is_that_of_the_steps_wherever_the_measurement_begins_in_one(phase: float) -> None:
    """Eight jobs end together every 7 seconds."""
    measured = ThroughputSample(workers=8, begin_after=0)
    for tick in range(40):
        now = 2.0 * tick
        done = 8 * int((now + phase) // 7)
        measured.add(WorkerSample(now_s=now, finished=done, work=float(done), in_hand=8))
    assert measured.rate == pytest.approx(8 / 7, rel=0.03)
    assert (measured.seconds, measured.fullness) == (78, 1)


def test_jobs_from_before_a_change_are_no_part_of_the_measurement() -> None:
    measured = ThroughputSample(workers=2, begin_after=10)
    measured.add(WorkerSample(now_s=0, finished=9, work=900, in_hand=2))
    measured.add(WorkerSample(now_s=1, finished=12, work=1200, in_hand=5))
    assert (measured.seconds, measured.rate, measured.fullness) == (0, 0, 0)
    measured.add(WorkerSample(now_s=2, finished=13, work=1300, in_hand=2))
    measured.add(WorkerSample(now_s=4, finished=14, work=1302, in_hand=1))
    assert (measured.seconds, measured.finished, measured.rate, measured.fullness) == (2, 1, 1, 0.75)
