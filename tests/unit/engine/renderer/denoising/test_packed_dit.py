# SPDX-License-Identifier: Apache-2.0
"""The packed DiT against diffusers' own forward pass, branch by branch, and how often it is compiled."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from acestep_consumer.engine.renderer.denoising.cuda_graphs import raise_recompile_limit
from acestep_consumer.engine.renderer.denoising.packed_dit import PackedDit, _consecutive
from acestep_consumer.engine.testing import tiny_checkpoint

CHANNELS, WIDTH = 4, 32
ODD = [2, 25, 1, 60, 33]
BEYOND_THE_WINDOW = [700, 7, 515]  # frames; half as many tokens, and a window sees 128 on either side
LENGTHS = [[1], [2], [26], [13, 13], ODD, BEYOND_THE_WINDOW]


@dataclass(frozen=True)
class Branch:
    """Inputs of one pass through the DiT."""

    latents: torch.Tensor
    context: torch.Tensor
    states: torch.Tensor
    time: float


@pytest.fixture(scope="module")
def plain() -> Any:
    """The tiny DiT. Its biases and tables start at zero, which would hide a wrong use of them."""
    with tiny_checkpoint._private_randomness(3):
        dit = tiny_checkpoint._transformer(turbo=True).eval()
        with torch.no_grad():
            for name, weight in dit.named_parameters():
                if name.endswith("bias") or "table" in name:
                    weight.normal_(std=0.3)
    return dit.requires_grad_(requires_grad=False)


@pytest.fixture
def packed(plain: Any) -> PackedDit:
    dit = PackedDit(plain)
    dit.join_cross_weights()
    return dit


def branches_of(frames: Sequence[int]) -> list[Branch]:
    """Make branches with conditions of different lengths and with different time steps."""
    noise = torch.Generator().manual_seed(len(frames))
    return [
        Branch(
            torch.randn(count, CHANNELS, generator=noise),
            torch.randn(count, 2 * CHANNELS, generator=noise),
            torch.randn(3 + 5 * index, WIDTH, generator=noise),
            1.0 - index / (len(frames) + 1),
        )
        for index, count in enumerate(frames)
    ]


def packed_velocities(dit: PackedDit, branches: Sequence[Branch]) -> list[torch.Tensor]:
    conditions = dit.conditions([branch.states for branch in branches])
    pack = dit.lay_out([len(branch.latents) for branch in branches], conditions)
    flow = dit.velocities(
        pack,
        pack.join([branch.latents for branch in branches]),
        pack.join([branch.context for branch in branches]),
        torch.cat([condition.kv for condition in conditions], dim=2),
        torch.tensor([*(branch.time for branch in branches), 0.0]),
    )
    return pack.split(flow)


def plain_velocity(dit: Any, branch: Branch) -> torch.Tensor:
    time = torch.tensor([branch.time])
    flow: torch.Tensor = dit(
        hidden_states=branch.latents[None],
        timestep=time,
        timestep_r=time,
        encoder_hidden_states=branch.states[None],
        context_latents=branch.context[None],
        return_dict=False,
    )[0]
    return flow[0]


@pytest.mark.parametrize("frames", LENGTHS, ids=str)
def test_each_branch_gets_the_velocity_that_diffusers_predicts_for_it_alone(
    frames: list[int], packed: PackedDit, plain: Any
) -> None:
    branches = branches_of(frames)
    for branch, found in zip(branches, packed_velocities(packed, branches), strict=True):
        assert found.shape == branch.latents.shape
        torch.testing.assert_close(found, plain_velocity(plain, branch), rtol=0, atol=1e-5)


def test_a_branches_time_is_its_own(packed: PackedDit) -> None:
    """Another time for one branch changes that branch and no other."""
    branches = branches_of(ODD)
    before = packed_velocities(packed, branches)
    later = [
        Branch(each.latents, each.context, each.states, 0.01 if index == 3 else each.time)
        for index, each in enumerate(branches)
    ]
    after = packed_velocities(packed, later)
    for index, (one, other) in enumerate(zip(before, after, strict=True)):
        assert torch.allclose(one, other, rtol=0, atol=1e-6) == (index != 3)


def test_one_token_of_a_repeated_condition_equals_all_of_them(packed: PackedDit) -> None:
    """The empty condition of guidance is one vector for each token: one token says the same."""
    (branch,) = branches_of([40])
    null = branch.states[:1]
    short, long = (Branch(branch.latents, branch.context, states, 0.5) for states in (null, null.expand(300, -1)))
    (one,), (other,) = (packed_velocities(packed, [each]) for each in (short, long))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_condition_does_not_keep_the_memory_of_others(packed: PackedDit) -> None:
    """A song that leaves early frees its keys and values, though all conditions were computed together."""
    for condition, tokens in zip(
        packed.conditions([torch.zeros(count, WIDTH) for count in (5, 90)]), (5, 90), strict=True
    ):
        assert condition.tokens == tokens
        assert condition.kv.untyped_storage().nbytes() == condition.kv.numel() * condition.kv.itemsize


def states() -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(7)
    return [torch.randn(tokens, WIDTH, generator=noise) for tokens in (5, 1, 12)]


class TestJoinedCrossWeights:
    """Keys and values of all layers from one product, while the layers' weights lie one after the other."""

    @pytest.fixture
    def own(self, plain: Any) -> Any:
        return copy.deepcopy(plain)

    def test_the_keys_and_values_are_those_of_the_layers(self, own: Any) -> None:
        apart, dit = PackedDit(own), PackedDit(copy.deepcopy(own))
        dit.join_cross_weights()
        assert _consecutive(dit._cross_weights()) is not None
        assert _consecutive(apart._cross_weights()) is None
        for found, wanted in zip(dit.conditions(states()), apart.conditions(states()), strict=True):
            torch.testing.assert_close(found.kv, wanted.kv, rtol=0, atol=2e-6)
            assert found.kv.untyped_storage().nbytes() == found.kv.numel() * found.kv.itemsize

    def test_joining_changes_no_weight_and_takes_no_more_memory(self, own: Any) -> None:
        before = {name: weight.clone() for name, weight in own.named_parameters()}
        dit = PackedDit(own)
        dit.join_cross_weights()
        weights = dit._cross_weights()
        assert all(torch.equal(weight, before[name]) for name, weight in own.named_parameters())
        assert weights[0].untyped_storage().nbytes() == sum(weight.numel() * weight.itemsize for weight in weights)

    def test_a_weight_that_is_changed_in_place_counts(self, own: Any) -> None:
        dit = PackedDit(own)
        dit.join_cross_weights()
        with torch.no_grad():
            own.layers[1].cross_attn.to_v.weight.mul_(2)
        (found, *_), (wanted, *_) = dit.conditions(states()), PackedDit(copy.deepcopy(own)).conditions(states())
        torch.testing.assert_close(found.kv, wanted.kv, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("change", ["moved", "replaced"])
    def test_weights_that_are_moved_or_replaced_are_used_where_they_are_now(self, own: Any, change: str) -> None:
        dit = PackedDit(own)
        dit.join_cross_weights()
        if change == "moved":
            own.to(torch.float64).to(torch.float32)
        else:
            keys = own.layers[0].cross_attn.to_k
            keys.weight = torch.nn.Parameter(torch.ones_like(keys.weight))
        assert _consecutive(dit._cross_weights()) is None
        wanted = PackedDit(copy.deepcopy(own)).conditions(states())
        for found, other in zip(dit.conditions(states()), wanted, strict=True):
            torch.testing.assert_close(found.kv, other.kv, rtol=0, atol=0)


@pytest.fixture(scope="module")
def compiled(plain: Any) -> Iterator[tuple[PackedDit, CompileCounter]]:
    """The packed DiT after its first batch, which has compiled it, and the count of compilations."""
    raise_recompile_limit()
    dit, counter = PackedDit(plain), CompileCounter()
    dit.compile(backend=counter)
    with torch.no_grad():
        packed_velocities(dit, branches_of([300, 44]))
    yield dit, counter
    torch.compiler.reset()


def test_the_queries_for_lyrics_take_no_compilation_of_their_own(
    plain: Any, compiled: tuple[PackedDit, CompileCounter]
) -> None:
    (branch,) = branches_of([60])
    times = torch.tensor([branch.time, 0.0])

    def queries(dit: PackedDit, last: int) -> list[tuple[int, torch.Tensor]]:
        conditions = dit.conditions([branch.states])
        pack = dit.lay_out([60], conditions)
        inputs = torch.cat([pack.join([branch.context]), pack.join([branch.latents])], dim=-1)
        return list(dit.lyric_queries(pack, inputs, conditions[0].kv[: last + 1], times, {0, last}))

    wanted = queries(PackedDit(plain), last=1)
    dit, counter = compiled
    before = counter.frame_count
    with torch.no_grad():
        found = queries(dit, last=1)
    assert counter.frame_count == before
    assert [layer for layer, _ in found] == [0, 1]
    for (_, ours), (_, plainly) in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plainly, rtol=0, atol=1e-5)


def test_two_kinds_of_blocks_are_compiled_once_for_every_batch(
    plain: Any, compiled: tuple[PackedDit, CompileCounter]
) -> None:
    """One song, equal songs, many songs, songs of one token each: nothing is compiled a second time.

    Only a pack that is a single token, a lone song of 0.08 seconds, would be.
    """
    dit, counter = compiled
    assert counter.frame_count == len({block.window for block in dit._blocks}) == 2
    with torch.no_grad():
        for frames in ([26], [26, 26], [2, 2], [1, 1, 1], *LENGTHS[2:], [300, 44], [3]):
            branches = branches_of(frames)
            for branch, found in zip(branches, packed_velocities(dit, branches), strict=True):
                torch.testing.assert_close(found, plain_velocity(plain, branch), rtol=0, atol=1e-5)
    assert counter.frame_count == 2
