# SPDX-License-Identifier: Apache-2.0
"""Guidance, and the filter of velocities."""

import pytest
import torch

from acestep_consumer.engine.renderer.denoising.guidance import Guidance, VelocityFilter, by_angle
from acestep_consumer.engine.renderer.denoising.packed_dit import Condition

NULL = Condition(torch.zeros(1, 2, 1, 1, 1))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("time", "applies"), [(0.9, False), (0.8, True), (0.5, True), (0.3, True), (0.2, False)])
def test_guidance_applies_between_two_flow_times(time: float, applies: bool) -> None:  # noqa: FBT001 - parametrized
    assert Guidance(3.0, (0.3, 0.8), NULL).applies(time) is applies


def test_guidance_by_angles_without_a_difference_is_the_velocity_itself() -> None:
    velocity, latents = random(5, 4, seed=1), random(5, 4, seed=2)
    torch.testing.assert_close(by_angle(velocity, velocity, latents, 0.5, 7.0), velocity)


def test_guidance_by_angles_never_turns_further_than_a_sixth_of_a_half_turn() -> None:
    latents, time = random(50, 4, seed=3), 0.8
    conditional, unconditional = random(50, 4, seed=4), random(50, 4, seed=5)
    guided = by_angle(conditional, unconditional, latents, time, 30.0).double()
    song, plain, turned = (latents.double() - time * each.double() for each in (conditional, unconditional, guided))
    # The part beside the unguided song is turned; the part along it is the conditional song's.
    away = turned - torch.cos(torch.tensor(3.14 / 6)) * song
    along = (away * plain).sum(-1).abs()
    assert float(along.max()) < 1e-4


def test_a_velocity_is_limited_by_the_norm_of_the_latents() -> None:
    velocity, latents = random(6, 2, seed=6), random(6, 2, seed=7)
    held = VelocityFilter(limit=0.5).apply(velocity, latents)
    torch.testing.assert_close(held.norm(), 0.5 * latents.norm())
    assert torch.equal(VelocityFilter(limit=100).apply(velocity, latents), velocity)


def test_a_velocity_is_smoothed_with_the_one_before() -> None:
    velocity_filter, latents = VelocityFilter(smoothing=0.25), torch.ones(1, 1)
    first, second = torch.tensor([[4.0]]), torch.tensor([[8.0]])
    assert torch.equal(velocity_filter.apply(first, latents), first)
    first.zero_()  # velocities are overwritten by the next forward pass
    assert velocity_filter.apply(second, latents).item() == 0.75 * 8 + 0.25 * 4
    assert velocity_filter.fresh().last is None


def test_a_filter_of_nothing_returns_what_it_is_given() -> None:
    velocity = random(3, 2, seed=8)
    assert VelocityFilter().apply(velocity, velocity) is velocity
