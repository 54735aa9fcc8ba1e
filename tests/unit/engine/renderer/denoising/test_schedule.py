# SPDX-License-Identifier: Apache-2.0
"""Flow times of the denoising steps."""

import pytest

from acestep_consumer.engine.renderer.denoising.schedule import flow_times, started_from_source


def test_times_fall_from_noise_to_song_and_are_shifted() -> None:
    assert flow_times(4, 1.0) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert flow_times(4, 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))


def test_given_times_take_the_place_of_steps_and_shift() -> None:
    assert flow_times(50, 3.0, (0.75, 0.5)) == (0.75, 0.5, 0.0)


@pytest.mark.parametrize(("strength", "left"), [(0.0, 5), (0.3, 4), (0.5, 3), (1.0, 2)])
def test_a_song_that_starts_from_its_source_leaves_out_the_first_steps(strength: float, left: int) -> None:
    times = flow_times(4, 1.0)
    assert started_from_source(times, strength) == times[-left:]
