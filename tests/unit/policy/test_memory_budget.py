# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on bytes: what is admitted stays within the limit, and more memory never means less work."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.policy.memory_budget import ENOUGH_TOKENS, TILE_RUNGS, MemoryBudget, MemoryFootprint

GIB = 2**30
LEAST_TOKENS = 512

footprints = st.builds(
    MemoryFootprint,
    weights=st.integers(0, 20 * GIB),
    token=st.integers(0, 2**21),
    condition_token=st.integers(0, 2**18),
    tile=st.integers(0, 4 * GIB),
    frame=st.integers(0, 2**16),
)
budgets = st.builds(
    MemoryBudget,
    limit=st.integers(0, 200 * GIB),
    footprint=footprints,
    max_tokens=st.integers(LEAST_TOKENS, 4 * ENOUGH_TOKENS),
)
songs = st.tuples(st.integers(1, 15_000), st.integers(1, 4_000))


@given(budgets, st.lists(songs, max_size=12))
def test_what_has_room_beside_a_first_song_fits_with_weights_and_work(
    budget: MemoryBudget, asked: list[tuple[int, int]]
) -> None:
    """The first song is let in unasked: whatever it takes, it is never to wait for ever."""
    needs = [budget.held(*song) for song in asked]
    held, company = sum(needs[:1]), 0
    for more in needs[1:]:
        if budget.has_room(held, more):
            held, company = held + more, company + 1
    assert budget.limit is not None
    assert not company or budget.footprint.weights + budget.working + held <= budget.limit


@given(budgets, st.integers(1, 64 * GIB), st.integers(0, 64 * GIB), st.integers(0, 64 * GIB))
def test_a_smaller_song_has_room_wherever_a_larger_one_has(
    budget: MemoryBudget, held: int, small: int, further: int
) -> None:
    if budget.has_room(held, small + further):
        assert budget.has_room(held, small)


@given(budgets, st.integers(0, 200 * GIB))
def test_more_memory_never_means_smaller_packs_or_fewer_tiles(budget: MemoryBudget, further: int) -> None:
    assert budget.limit is not None
    richer = replace(budget, limit=budget.limit + further)
    assert (richer.tokens, richer.tiles) >= (budget.tokens, budget.tiles)
    assert richer.tokens >= budget.tokens
    assert richer.tiles >= budget.tiles


@given(budgets)
def test_packs_and_tiles_stay_within_their_bounds_and_half_of_what_is_free(budget: MemoryBudget) -> None:
    assert budget.free is not None
    assert LEAST_TOKENS <= budget.tokens <= budget.max_tokens
    assert budget.tiles in TILE_RUNGS
    half = budget.free // 2
    assert budget.tokens == LEAST_TOKENS or budget.tokens * budget.footprint.token <= half
    assert budget.tiles == TILE_RUNGS[-1] or budget.tiles * budget.footprint.tile <= half


@given(footprints, st.integers(1, 4 * ENOUGH_TOKENS), songs)
def test_without_a_limit_nothing_is_held_back(footprint: MemoryFootprint, tokens: int, song: tuple[int, int]) -> None:
    budget = MemoryBudget(footprint=footprint, max_tokens=tokens)
    assert budget.free is None
    assert (budget.tokens, budget.tiles) == (tokens, TILE_RUNGS[0])
    assert budget.has_room(1_000 * GIB, budget.held(*song))


def test_a_device_smaller_than_its_weights_has_room_for_no_company() -> None:
    budget = MemoryBudget(limit=GIB, footprint=MemoryFootprint(weights=2 * GIB, token=1000, tile=1000, frame=1000))
    assert budget.free == 0
    assert (budget.tokens, budget.tiles) == (LEAST_TOKENS, 1)
    assert not budget.has_room(1, 1)


def test_songs_and_their_conditions_count_by_their_length() -> None:
    budget = MemoryBudget(footprint=MemoryFootprint(frame=10, condition_token=3))
    assert budget.held(100, 7) == 1021
