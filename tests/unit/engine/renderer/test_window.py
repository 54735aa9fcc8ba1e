# SPDX-License-Identifier: Apache-2.0
"""Windows of repaint and lego: their frames, their ramps, and the latents that are kept around them."""

import pytest
import torch

from acestep_consumer.engine.renderer.window import KeepRules, KeptLatents, Window


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [
        (None, None, (0, 100)),
        (1.0, 2.0, (25, 50)),
        (1.999, None, (49, 100)),
        (1.0, 1.01, (25, 26)),
        (3.9999, 9.0, (99, 100)),
        (7.0, 9.0, (99, 100)),
    ],
)
def test_a_window_has_at_least_one_frame_and_lies_in_the_song(
    start: float | None, end: float | None, found: tuple[int, int]
) -> None:
    window = Window.of(start, end, 25.0, 100)
    assert (window.start, window.end, window.length) == (*found, 100)
    assert window.whole == (found == (0, 100))


def test_ramps_are_outside_the_window_and_as_long_as_there_is_room() -> None:
    assert Window(3, 5, 9).mask(fade=1).tolist() == [0, 0, 0.5, 1, 1, 0.5, 0, 0, 0]
    assert Window(1, 5, 6).mask(fade=3).tolist() == [0.5, 1, 1, 1, 1, 0.5]
    assert Window(0, 5, 6).mask().tolist() == [1, 1, 1, 1, 1, 0]


def kept(**rules: float | bool) -> KeptLatents:
    source, noise = torch.full((4, 1), 10.0), torch.full((4, 1), 2.0)
    return KeptLatents(Window(1, 2, 4), KeepRules(**rules), source, noise)  # type: ignore[arg-type]  # as a test gives them


def test_latents_outside_are_the_noised_source_after_the_first_steps() -> None:
    latents = torch.zeros(4, 1)
    found = [kept(ratio=0.5).after_step(latents, step, 4, 0.25).flatten().tolist() for step in range(4)]
    assert found == [[8.0, 0.0, 8.0, 8.0]] * 2 + [[0.0] * 4] * 2


def test_the_last_step_of_turbo_resets_nothing() -> None:
    latents = torch.zeros(4, 1)
    assert kept(ratio=1.0).after_step(latents, 3, 4, 0.0).flatten().tolist() == [10, 0, 10, 10]
    assert kept(ratio=1.0, last_step=False).after_step(latents, 3, 4, 0.0).flatten().tolist() == [0, 0, 0, 0]


def test_the_final_latents_fade_into_those_of_the_source() -> None:
    found = kept(latent_frames=1).after_step(torch.zeros(4, 1), 0, 1, 0.0)
    assert found.flatten().tolist() == [5, 0, 5, 10]
