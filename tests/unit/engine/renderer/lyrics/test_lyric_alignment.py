# SPDX-License-Identifier: Apache-2.0
"""Alignment of lyrics that cannot be had. The golden cases hold those that can."""

import pytest
import torch

from acestep_consumer.engine.renderer.lyrics.lyric_alignment import LyricTokens, Piece, align

LYRICS = LyricTokens(start=0, count=3, pieces=tuple(Piece(text, at, at) for at, text in enumerate("la\n")))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_attention_that_is_not_numbers_aligns_nothing(value: float) -> None:
    matrices = torch.zeros(2, 3, 9)
    matrices[0, 1, 4] = value
    assert align(matrices, LYRICS, 0.08) is None


def test_attention_to_nothing_aligns_all_the_same() -> None:
    found = align(torch.zeros(2, 3, 9), LYRICS, 0.08)
    assert found is not None
    assert [line.text for line in found.lines] == ["la"]
