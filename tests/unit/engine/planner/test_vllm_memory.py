# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of a planner that starts beside the renderer: within its share, whatever the trial pass took."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.engine.planner.vllm_memory import UNCOUNTED_BYTES, cache_bytes
from acestep_consumer.policy.benchmarks import GIB, RESERVE_GB
from acestep_consumer.policy.lm_choice import LmRequest, loads_beside, plan_lm, renderer_share
from acestep_consumer.policy.tiers import BUILT_IN, LMS


@given(st.integers(1, 200 * 10**9), st.integers(0, 200 * 10**9))
def test_weights_activations_cache_and_allowance_are_never_more_than_the_share(share: int, peak: int) -> None:
    if share <= peak + UNCOUNTED_BYTES:
        with pytest.raises(ValueError, match="no room for keys and values"):
            cache_bytes(share, peak)
    else:
        assert peak + cache_bytes(share, peak) + UNCOUNTED_BYTES == share


@pytest.mark.parametrize(("vram_gb", "beside"), [(16, False), (24, False), (32, False), (48, True), (80, True)])
def test_engines_load_side_by_side_where_trial_runs_of_one_cannot_take_the_others_memory(
    vram_gb: float, *, beside: bool
) -> None:
    plan = plan_lm(LmRequest(init=True, model=LMS[1]), BUILT_IN.tier_of(vram_gb), vram_gb)
    assert plan is not None
    assert loads_beside(plan, vram_gb, 1) is beside


@given(st.floats(4, 300), st.integers(1, 3))
def test_two_engines_that_load_side_by_side_have_the_whole_card_and_no_more(vram_gb: float, models: int) -> None:
    plan = plan_lm(LmRequest(init=True), BUILT_IN.tier_of(vram_gb), vram_gb)
    assert plan is not None
    renderer = renderer_share(plan, vram_gb)
    if loads_beside(plan, vram_gb, models):
        assert plan.memory_gb * 1e9 + (renderer + RESERVE_GB) * GIB <= vram_gb * GIB * (1 + 1e-9)
        assert renderer >= 20 * models
