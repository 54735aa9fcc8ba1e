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
    degradation = Degradation.of(MemoryBudget(max_tokens=3000))
    assert (degradation.tokens, degradation.tiles, degradation.reductions) == (3000, TILE_RUNGS[0], 0)


@given(st.lists(st.integers(1, 9_000), min_size=2, max_size=64))
def test_batches_shrink_strictly_until_songs_are_alone(songs: list[int]) -> None:
    """Batches are made as the scheduler does. A size that failed is never tried again."""
    degradation, tried, texts = Degradation(tokens=8192, tiles=8), [], []
    while len(members := first_of(songs, degradation.tokens)) > 1:
        tried.append(sum(members))
        texts.append(degradation.step_down(DeviceStage.STEP, len(members), sum(members)))
    assert all(later < earlier for earlier, later in pairwise(tried))
    assert degradation.step_down(DeviceStage.STEP, 1, sum(members)) is None
    assert degradation.reductions == len(texts)
    assert all(re.search(r"out of memory with \d+ songs in a batch", text or "") for text in texts)


def first_of(songs: list[int], limit: int) -> list[int]:
    members: list[int] = []
    for tokens in songs:
        if members and sum(members) + tokens > limit:
            break
        members.append(tokens)
    return members


def test_the_decode_is_reduced_step_by_step_to_one_tile() -> None:
    degradation, seen = Degradation(tokens=8192, tiles=TILE_RUNGS[0]), [TILE_RUNGS[0]]
    while degradation.step_down(DeviceStage.DECODE, 3, 100):
        seen.append(degradation.tiles)
    assert tuple(seen) == TILE_RUNGS
    assert degradation.reductions == len(TILE_RUNGS) - 1
    assert degradation.tokens == 8192


@given(st.integers(1, 16))
def test_fewer_jobs_are_prepared_together_until_each_is_alone(jobs: int) -> None:
    degradation, seen = Degradation(tokens=8192, tiles=8), [jobs]
    while degradation.step_down(DeviceStage.PREPARE, seen[-1], 0):
        seen.append(degradation.jobs)
    assert all(later < earlier for earlier, later in pairwise(seen))
    assert seen[-1] == 1
    assert (degradation.tokens, degradation.tiles) == (8192, 8)


@pytest.mark.parametrize("stage", [DeviceStage.PREPARE, DeviceStage.STEP])
def test_a_job_alone_cannot_be_reduced(stage: DeviceStage) -> None:
    degradation = Degradation(tokens=8192, tiles=8)
    assert degradation.step_down(stage, 1, 4000) is None
    assert degradation == Degradation(tokens=8192, tiles=8)
