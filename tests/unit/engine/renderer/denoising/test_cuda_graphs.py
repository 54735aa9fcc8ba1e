# SPDX-License-Identifier: Apache-2.0
"""Packs in the memory of CUDA graphs: their velocities, and which packs there is room for.

A graph is for a CUDA device. Here the function that it would capture is called in its place.
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from acestep_consumer.engine.renderer.denoising.cuda_graphs import StepGraphs, _StepMemory
from acestep_consumer.engine.renderer.denoising.packed_dit import Branch, PackedDit
from acestep_consumer.engine.testing import tiny_checkpoint
from acestep_consumer.policy.benchmarks import DIT_2B, DIT_SIZES, GIB, DitSize
from acestep_consumer.policy.memory_budget import StepGraphLimits

CHANNELS, WIDTH = 4, 32
LIMITS = StepGraphLimits.on_a_device_with(vram_gb=16)
Step = Callable[[], torch.Tensor]


@pytest.fixture(scope="module")
def dit() -> PackedDit:
    with tiny_checkpoint._private_randomness(3):
        made: Any = tiny_checkpoint._transformer(turbo=True).eval()
    return PackedDit(made.requires_grad_(requires_grad=False))


@pytest.fixture
def captured() -> list[Step]:
    """The functions that were captured."""
    return []


@pytest.fixture
def graphs(dit: PackedDit, captured: list[Step]) -> StepGraphs:
    def capture(step: Step) -> Step:
        captured.append(step)
        return step

    return StepGraphs(dit, LIMITS, capture)


def branches_of(dit: PackedDit, frames: Sequence[int], seed: int = 0, condition: int = 5) -> list[Branch]:
    """Make branches with conditions of different lengths."""
    noise = torch.Generator().manual_seed(seed)
    states = [torch.randn(condition + index % 5, WIDTH, generator=noise) for index in range(len(frames))]
    return [
        Branch(own, torch.randn(count, 2 * CHANNELS, generator=noise), torch.randn(count, CHANNELS, generator=noise))
        for own, count in zip(dit.conditions(states), frames, strict=True)
    ]


def times_of(branches: Sequence[Branch]) -> torch.Tensor:
    return torch.tensor([*(1 - index / 80 for index in range(len(branches))), 0.0])


def in_graphs(graphs: StepGraphs, branches: Sequence[Branch]) -> list[torch.Tensor]:
    pack, flow = graphs.load(branches)
    velocities = flow(pack.join([branch.latents for branch in branches]), times_of(branches))
    return [each.clone() for each in pack.split(velocities)[: len(branches)]]


def in_a_pack_of_their_own(dit: PackedDit, branches: Sequence[Branch]) -> list[torch.Tensor]:
    pack = dit.lay_out([len(branch.latents) for branch in branches], [branch.condition for branch in branches])
    latents, context = (
        pack.join(parts) for parts in ([branch.latents for branch in branches], [branch.context for branch in branches])
    )
    kv = torch.cat([branch.condition.kv for branch in branches], dim=2)
    return pack.split(dit.velocities(pack, latents, context, kv, times_of(branches)))


def test_the_memory_of_the_graphs_is_told_from_the_first_pack_on_until_it_is_freed(
    graphs: StepGraphs, dit: PackedDit
) -> None:
    assert graphs.bytes == 0
    graphs.load(branches_of(dit, [40]))
    keys_and_values = dit.conditions([torch.zeros(LIMITS.condition_tokens, WIDTH)])[0].kv.nbytes
    latents_and_context = 3 * CHANNELS * dit.patch * LIMITS.tokens * dit.dtype.itemsize
    assert keys_and_values + latents_and_context < graphs.bytes < 1.5 * (keys_and_values + latents_and_context)
    graphs.clear()
    assert graphs.bytes == 0


@pytest.mark.parametrize(("vram_gb", "gib"), [(16, 0.10), (39.5, 0.10), (40, 0.43), (141, 0.43)])
@pytest.mark.parametrize("size", DIT_SIZES)
def test_plan_counts_what_the_graphs_of_a_full_size_model_work_on(size: DitSize, vram_gb: float, gib: float) -> None:
    config = SimpleNamespace(audio_acoustic_hidden_dim=64)
    full: Any = SimpleNamespace(
        dit=SimpleNamespace(config=config, head_dim=128), patch=2, device=torch.device("meta"), dtype=torch.bfloat16
    )
    limits = StepGraphLimits.on_a_device_with(vram_gb)
    kv = torch.empty(size.layers, 2, 1, 8, 128, device="meta", dtype=torch.bfloat16)
    assert size.graph_bytes(limits) == pytest.approx(_StepMemory(full, limits, kv).bytes, rel=1e-4)
    assert size.graph_bytes(limits) / GIB == pytest.approx(gib * size.layers / DIT_2B.layers, abs=0.01)


PACKS = [[750], [1, 33, 26], [750] * 6, [2] * 70, [768], [1535, 7], [13]]


def test_velocities_in_the_memory_of_the_graphs_are_those_of_a_pack_of_its_own(
    graphs: StepGraphs, dit: PackedDit, captured: list[Step]
) -> None:
    """Packs of any size follow one another; what the one before left is not seen."""
    for seed, frames in enumerate(PACKS):
        branches = branches_of(dit, frames, seed)
        assert graphs.has_room(branches)
        for found, expected in zip(in_graphs(graphs, branches), in_a_pack_of_their_own(dit, branches), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # 384 tokens (of 375 and 384), 128 (of 31, 30 and 7), 2304 (of 2250), 896 (of 772).
    assert len(captured) == 4


def test_a_step_of_the_same_pack_has_its_own_latents_and_times(graphs: StepGraphs, dit: PackedDit) -> None:
    branches = branches_of(dit, [25, 60])
    pack, flow = graphs.load(branches)
    for step in range(3):
        later = [Branch(each.condition, each.context, each.latents * (step + 1)) for each in branches]
        found = pack.split(flow(pack.join([each.latents for each in later]), times_of(later)))[:2]
        for one, expected in zip(found, in_a_pack_of_their_own(dit, later), strict=True):
            torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)


def test_a_song_that_is_not_a_number_spoils_no_song_that_comes_after_it(graphs: StepGraphs, dit: PackedDit) -> None:
    (spoilt,) = branches_of(dit, [700])
    for part in (spoilt.latents, spoilt.context, spoilt.condition.kv):
        part.fill_(math.nan)
    assert in_graphs(graphs, [spoilt])[0].isnan().all()
    branches = branches_of(dit, [25], seed=1)
    torch.testing.assert_close(in_graphs(graphs, branches), in_a_pack_of_their_own(dit, branches), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "condition", "room"),
    [
        pytest.param([750] * 6, 5, True, id="six songs of 30 s"),
        pytest.param([750] * 7, 5, False, id="seven: more tokens than the limit"),
        pytest.param([7500], 5, False, id="300 s"),
        pytest.param([2] * 70, 5, True, id="as many branches as there are places"),
        pytest.param([2] * 71, 5, False, id="a branch more"),
        pytest.param([750], LIMITS.condition_tokens - 1, True, id="the longest text"),
        pytest.param([750], LIMITS.condition_tokens, False, id="a longer text"),
    ],
)
def test_small_packs_alone_are_replayed(
    frames: list[int], condition: int, *, room: bool, graphs: StepGraphs, dit: PackedDit
) -> None:
    assert graphs.has_room(branches_of(dit, frames, condition=condition)) == room


def test_cleared_graphs_are_captured_again(graphs: StepGraphs, dit: PackedDit, captured: list[Step]) -> None:
    for _ in range(2):
        in_graphs(graphs, branches_of(dit, [25]))
        graphs.clear()
    assert len(captured) == 2


def test_a_pack_that_was_loaded_before_graphs_were_cleared_leaves_none_behind(
    graphs: StepGraphs, dit: PackedDit
) -> None:
    """A graph of memory that is no longer loaded would have the velocities of what was there."""
    branches, others = branches_of(dit, [25]), branches_of(dit, [25], seed=1)
    pack, flow = graphs.load(branches)
    graphs.clear()
    flow(pack.join([branch.latents for branch in branches]), times_of(branches))
    torch.testing.assert_close(in_graphs(graphs, others), in_a_pack_of_their_own(dit, others), rtol=0, atol=1e-5)
