# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of a planner that starts beside the renderer: within its share, whatever the trial pass took."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.policy.benchmarks import GIB, RESERVE_GB
from acestep_consumer.policy.lm_choice import LmRequest, loads_beside, plan_lm, renderer_share
from acestep_consumer.policy.lm_memory import PROCESSOR_BYTES, TRIAL_BYTES, UNCOUNTED_BYTES, cache_bytes
from acestep_consumer.policy.sizing import Workload
from acestep_consumer.policy.tiers import BUILT_IN, LMS


@given(st.integers(1, 200 * 10**9), st.integers(0, 200 * 10**9))
def test_weights_activations_cache_and_allowance_are_never_more_than_the_share(share: int, peak: int) -> None:
    if share <= peak + UNCOUNTED_BYTES:
        with pytest.raises(ValueError, match="no room for keys and values"):
            cache_bytes(share, peak)
    else:
        assert peak + cache_bytes(share, peak) + UNCOUNTED_BYTES == share


@pytest.mark.parametrize(
    ("vram_gb", "beside"), [(16, False), (24, False), (31, False), (32, True), (48, True), (80, True)]
)
def test_engines_load_side_by_side_where_trial_runs_of_one_cannot_take_the_others_memory(
    vram_gb: float, *, beside: bool
) -> None:
    plan = plan_lm(LmRequest(init=True, model=LMS[1]), BUILT_IN.tier_of(vram_gb), vram_gb)
    assert plan is not None
    assert loads_beside(plan, vram_gb, 1) is beside


def test_a_language_model_without_room_beside_a_starting_renderer_loads_after_it() -> None:
    """VLLM would find nothing left for keys and values, and be started once more when the renderer is there."""
    plan = plan_lm(LmRequest(init=True, model=LMS[0]), BUILT_IN.tier_of(24), 24)
    assert plan is not None
    assert renderer_share(plan, 24) >= 20
    assert not loads_beside(plan, 24, 1)


@given(st.floats(4, 300), st.integers(1, 3))
def test_two_engines_that_load_side_by_side_have_the_whole_card_and_no_more(vram_gb: float, models: int) -> None:
    plan = plan_lm(LmRequest(init=True), BUILT_IN.tier_of(vram_gb), vram_gb)
    assert plan is not None
    renderer = renderer_share(plan, vram_gb)
    if loads_beside(plan, vram_gb, models):
        assert plan.memory_gb * 1e9 + (renderer + RESERVE_GB) * GIB <= vram_gb * GIB * (1 + 1e-9)
        assert renderer >= 20 * models


@given(st.floats(16, 300), st.sampled_from(LMS))
def test_plan_counts_no_more_keys_and_values_than_the_worker_has(vram_gb: float, model: str) -> None:
    """The share of vLLM is that of the LM without its logits processor, and its trial pass finds the weights."""
    plan = plan_lm(LmRequest(init=True, model=model, backend="vllm"), BUILT_IN.tier_of(vram_gb), vram_gb)
    assert plan is not None
    lm = plan.on_gpu(Workload(), vram_gb, 1)
    assert lm.most_songs is not None
    share = lm.memory - 2 * lm.most_songs * PROCESSOR_BYTES
    peak = lm.size.weights + TRIAL_BYTES
    if lm.beside and share > peak + UNCOUNTED_BYTES:
        assert lm.memory - lm.weights == cache_bytes(share, peak)
    elif not lm.beside:
        assert lm.memory - lm.weights == share - peak


def test_vllm_is_not_counted_on_where_its_cache_is_smaller_than_its_context() -> None:
    """A song of 300 s has room, and vLLM does not start all the same."""
    plan = plan_lm(LmRequest(init=True, model=LMS[0]), BUILT_IN.tier_of(25), 25)
    assert plan is not None
    lm = plan.on_gpu(Workload(), 25, 1)
    assert lm.backend == "pt"
    assert replace(lm, backend="vllm").memory - replace(lm, backend="vllm").weights > lm.song(Workload())
