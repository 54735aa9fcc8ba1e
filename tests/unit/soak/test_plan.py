# SPDX-License-Identifier: Apache-2.0
"""The soak's plan of faults: the same for the same seed, all kinds in it, and none in another's way."""

from itertools import pairwise

import pytest

from tests.soak.plan import FIRST_S, Fault, Kind, plan

MINUTES_10 = 600.0
PAUSE_S = 3.5


def test_a_seed_gives_one_plan_and_another_seed_another() -> None:
    assert plan(7, MINUTES_10, PAUSE_S) == plan(7, MINUTES_10, PAUSE_S)
    assert plan(7, MINUTES_10, PAUSE_S) != plan(8, MINUTES_10, PAUSE_S)


@pytest.mark.parametrize("seed", range(5))
def test_ten_minutes_have_every_kind_of_fault(seed: int) -> None:
    assert {fault.kind for fault in plan(seed, MINUTES_10, PAUSE_S)} == set(Kind)


@pytest.mark.parametrize("seed", range(5))
def test_all_faults_are_over_when_the_run_is(seed: int) -> None:
    for fault in plan(seed, 120, PAUSE_S):
        assert fault.at_s >= FIRST_S
        assert fault.at_s + fault.lasts_s <= 120 + 0.02


@pytest.mark.parametrize("seed", range(5))
def test_one_wire_has_one_fault_at_a_time(seed: int) -> None:
    by_target: dict[object, list[Fault]] = {}
    for fault in plan(seed, MINUTES_10, PAUSE_S):
        by_target.setdefault((fault.kind.target, fault.slot), []).append(fault)
    for faults in by_target.values():
        assert all(earlier.at_s + earlier.lasts_s <= later.at_s for earlier, later in pairwise(faults))


def test_the_broker_is_nobodys_alone() -> None:
    assert all((fault.slot is None) == (fault.kind.target == "broker") for fault in plan(1, MINUTES_10, PAUSE_S))
