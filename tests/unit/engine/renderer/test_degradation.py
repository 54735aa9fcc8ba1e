# SPDX-License-Identifier: Apache-2.0
"""The ladder that leads down when memory runs out: every step asks for less, and there is a last one."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.engine.renderer.degradation import Degradation, DeviceStage
from acestep_consumer.policy.memory_budget import TILE_RUNGS, MemoryBudget


def test_it_starts_with_what_the_budget_allows() -> None:
    means = Degradation.of(MemoryBudget(max_tokens=3000))
    assert (means.tokens, means.tiles, means.squeezes) == (3000, TILE_RUNGS[0], 0)


@given(st.lists(st.integers(1, 9_000), min_size=2, max_size=64))
def test_packs_shrink_strictly_until_songs_are_alone(songs: list[int]) -> None:
    """As the batcher packs: the first songs that fit, one at least. Every size that failed is never tried again."""
    means, tried, words = Degradation(tokens=8192, tiles=8), [], []
    while len(members := first_of(songs, means.tokens)) > 1:
        tried.append(sum(members))
        words.append(means.step_down(DeviceStage.STEP, len(members), sum(members)))
    assert all(later < earlier for earlier, later in pairwise(tried))
    assert means.step_down(DeviceStage.STEP, 1, sum(members)) is None
    assert means.squeezes == len(words)
    assert all(re.search(r"memory ran out with \d+ songs in a pack", word or "") for word in words)


def first_of(songs: list[int], room: int) -> list[int]:
    members: list[int] = []
    for tokens in songs:
        if members and sum(members) + tokens > room:
            break
        members.append(tokens)
    return members


def test_the_decode_goes_down_every_rung_and_ends() -> None:
    means, seen = Degradation(tokens=8192, tiles=TILE_RUNGS[0]), [TILE_RUNGS[0]]
    while means.step_down(DeviceStage.DECODE, 3, 100):
        seen.append(means.tiles)
    assert tuple(seen) == TILE_RUNGS
    assert means.squeezes == len(TILE_RUNGS) - 1
    assert means.tokens == 8192


@given(st.integers(1, 16))
def test_fewer_jobs_are_prepared_together_until_each_is_alone(jobs: int) -> None:
    means, seen = Degradation(tokens=8192, tiles=8), [jobs]
    while means.step_down(DeviceStage.PREPARE, seen[-1], 0):
        seen.append(means.jobs)
    assert all(later < earlier for earlier, later in pairwise(seen))
    assert seen[-1] == 1
    assert (means.tokens, means.tiles) == (8192, 8)


@pytest.mark.parametrize("stage", [DeviceStage.PREPARE, DeviceStage.STEP])
def test_a_job_alone_has_nothing_to_give_up(stage: DeviceStage) -> None:
    means = Degradation(tokens=8192, tiles=8)
    assert means.step_down(stage, 1, 4000) is None
    assert means == Degradation(tokens=8192, tiles=8)
