# SPDX-License-Identifier: Apache-2.0
"""The renderer's share of the device's memory."""

import pytest

from acestep_consumer.engine.renderer.startup import share_of
from acestep_consumer.policy.benchmarks import GIB
from acestep_consumer.policy.sizing import GpuSpec, ModelSet, Workload, split_of


@pytest.mark.parametrize("vram_gb", [8, 12, 24])
def test_a_device_that_is_used_as_a_smaller_one_keeps_the_reserve_that_plan_counts(vram_gb: float) -> None:
    split = split_of(GpuSpec(name="", vram_gb=vram_gb), ModelSet(), Workload(thinking=False))
    assert share_of(vram_gb) == split.renderer / GIB


def test_without_a_limit_it_is_all_that_is_free_and_never_nothing() -> None:
    assert share_of(None) is None
    assert share_of(1) == 0.5
