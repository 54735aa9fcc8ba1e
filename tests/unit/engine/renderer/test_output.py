# SPDX-License-Identifier: Apache-2.0
"""Output of songs: level, kept samples of the source, fades."""

import pytest
import torch

from acestep_consumer.engine.renderer.output import (
    MINUS_1_DB,
    KeptSamples,
    OutputRules,
    faded,
    invalid_if_zero,
    limited,
    normalised,
    spliced,
)
from acestep_consumer.engine.renderer.window import Window


def test_latents_of_nothing_are_no_numbers_and_others_are_as_they_were() -> None:
    assert invalid_if_zero(torch.zeros(3, 2)).isnan().all()
    assert invalid_if_zero(torch.tensor([[0.0, 1e-9]])).tolist() == torch.tensor([[0.0, 1e-9]]).tolist()


def test_a_peak_above_full_scale_is_limited_and_another_is_left() -> None:
    assert limited(torch.tensor([[4.0, -2.0]])).tolist() == [[1.0, -0.5]]
    assert limited(torch.tensor([[0.5, -0.25]])).tolist() == [[0.5, -0.25]]


def test_the_peak_is_scaled_to_its_level_and_silence_stays_as_it_is() -> None:
    assert normalised(torch.tensor([[0.1, -0.2]])).abs().max() == pytest.approx(MINUS_1_DB)
    assert normalised(torch.tensor([[0.1, -0.2]]), 0.5).tolist()[0] == pytest.approx([0.25, -0.5])
    assert normalised(torch.tensor([[1e-9, 0.0]])).tolist() == torch.tensor([[1e-9, 0.0]]).tolist()


def test_the_source_is_kept_to_the_bit_and_the_new_part_alone_is_scaled() -> None:
    source, new = torch.rand(2, 100) / 3, torch.full((2, 100), 0.4)
    found = spliced(new, KeptSamples(source, Window(40, 60, 100), fade=10), OutputRules(peak=0.8))
    outside = torch.tensor([not 30 <= index < 70 for index in range(100)])
    assert torch.equal(found[:, outside], source[:, outside])
    assert torch.allclose(found[:, 40:60], torch.tensor(0.8))
    assert ((found[:, 30:40] > source[:, 30:40]) & (found[:, 30:40] < 0.8)).all()


def test_a_loud_source_holds_the_new_part_down() -> None:
    source, new = torch.full((1, 9), 0.9), torch.full((1, 9), 0.5)
    found = spliced(new, KeptSamples(source, Window(3, 6, 9), fade=0), OutputRules(peak=0.45))
    assert found[0].tolist() == pytest.approx([0.9] * 3 + [0.25] * 3 + [0.9] * 3)


def test_a_new_part_of_a_quiet_song_of_ours_is_as_quiet_as_the_song() -> None:
    source, new = torch.full((1, 9), 0.1), torch.full((1, 9), 0.11)
    kept = KeptSamples(source, Window(3, 6, 9), fade=0)
    found = spliced(new, kept, OutputRules(peak=0.8, raises_new_part=False))
    assert found[0].tolist() == pytest.approx([0.1] * 3 + [0.11] * 3 + [0.1] * 3)


def test_without_a_level_the_new_part_is_as_it_was_decoded() -> None:
    source, new = torch.rand(1, 9), torch.rand(1, 9)
    found = spliced(new, KeptSamples(source, Window(3, 6, 9), fade=0), OutputRules(peak=None))
    assert torch.equal(found, torch.cat([source[:, :3], new[:, 3:6], source[:, 6:]], dim=1))


@pytest.mark.parametrize("samples", [8, 12])
def test_a_source_of_another_length_is_kept_as_far_as_it_goes(samples: int) -> None:
    source, new = torch.rand(1, samples), torch.rand(1, 10)
    found = spliced(new, KeptSamples(source, Window(3, 6, samples), fade=0), OutputRules(peak=None))
    assert found.shape == new.shape
    assert torch.equal(found[:, 6:8], source[:, 6:8])


def test_fades_are_linear_and_no_longer_than_the_song() -> None:
    ones = torch.ones(1, 4)
    assert faded(ones, OutputRules(), 2) is ones
    assert faded(ones, OutputRules(fade_in_s=1.0), 2).tolist() == [[0, 1, 1, 1]]
    assert faded(ones, OutputRules(fade_out_s=1.5), 2).tolist() == [[1, 1, 0.5, 0]]
    assert faded(ones, OutputRules(fade_in_s=99), 2)[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
