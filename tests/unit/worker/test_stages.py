# SPDX-License-Identifier: Apache-2.0
"""Stage limits and ``auto`` together, on engines that are arithmetic: language model and renderer both have work."""

from functools import partial

import pytest

from acestep_consumer.worker.prefetch_policy import PrefetchPolicy, WorkerSample
from tests.support.simulated_worker import SimulatedWorker, Stations, simulate

FAST_LM = partial(Stations, lm_s=0.1, lm_song_s=0.00125)
BOUND_BY_LM = Stations(lm_s=0.3, lm_song_s=0.005, step_s=0.16)
BOUND_BY_RENDERER = FAST_LM(step_s=0.04, step_song_s=0.03, pack=3)
BOUND_BY_ENCODERS = FAST_LM(step_s=0.16, encode_s=4, encoders=6)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("stations", "narrowest", "most"),
    [
        # 64 songs of 60 steps on average, all at once; 3 songs of 8 steps; 6 encoders of 4 seconds.
        (BOUND_BY_LM, 64 / (60 * (0.3 + 64 * 0.005)), 64 + 12),
        (BOUND_BY_RENDERER, 3 / (8 * (0.04 + 3 * 0.03)), 44),
        (BOUND_BY_ENCODERS, 6 / 4, 28),
    ],
    ids=["the language model", "the renderer", "the encoders"],
)
def test_auto_keeps_both_engines_busy_whatever_the_narrowest_stage_is(
    stations: Stations, narrowest: float, most: int, seed: int
) -> None:
    worker = SimulatedWorker(stations, PrefetchPolicy(2, 256), seed=seed)
    seen = simulate(worker.run(warm_up_s=400, seconds=900))
    assert min(seen.lm, seen.renderer) > 0.9
    assert seen.rate > 0.94 * narrowest
    # No more jobs running than the stages need, and hardly any that wait for one.
    assert max(seen.prefetch) <= most
    assert sum(seen.waiting) / len(seen.waiting) < 5


@pytest.mark.parametrize("stations", [BOUND_BY_LM, BOUND_BY_RENDERER, BOUND_BY_ENCODERS])
@pytest.mark.parametrize("prefetch", [1, 24])
def test_limits_cost_no_throughput_at_a_prefetch_of_the_operators(stations: Stations, prefetch: int) -> None:
    limited, free = (
        simulate(SimulatedWorker(stations, prefetch=prefetch, limited=on).run(60, 300)) for on in (True, False)
    )
    assert limited.rate >= 0.98 * free.rate
    assert prefetch > 1 or set(limited.waiting) <= {0, 1}


def reading(second: float, workers: int, wanted: int, **more: float) -> WorkerSample:
    finished = int(100 * second)
    sample = {"now_s": second, "finished": finished, "work": finished, "in_hand": workers, "wanted": wanted, **more}
    return WorkerSample(**sample)  # type: ignore[arg-type]  # the test's numbers


def test_memory_goes_before_what_the_stages_want() -> None:
    policy = PrefetchPolicy(2, 64)
    for second in range(60):
        policy.read(reading(second, policy.workers, wanted=17 - policy.workers))
    assert (policy.workers, policy.reason) == (17, "stages")
    assert policy.read(reading(60, 17, wanted=10, memory=0.99)) == 16
    for second in range(61, 300):
        policy.read(reading(second, policy.workers, wanted=20, memory=0.5))
    assert policy.workers < 24
    for second in range(400, 500):
        policy.read(reading(second, policy.workers, wanted=20, memory=0.5))
    assert policy.workers > 24


def test_a_worker_that_waits_for_messages_keeps_its_number() -> None:
    policy = PrefetchPolicy(2, 64)
    for second in range(60):
        policy.read(reading(second, policy.workers, wanted=12 - policy.workers))
    assert policy.workers == 12
    for second in range(60, 200):
        policy.read(reading(second, 3, wanted=50))
    assert policy.workers == 12
