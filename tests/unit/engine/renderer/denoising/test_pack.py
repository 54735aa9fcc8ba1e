# SPDX-License-Identifier: Apache-2.0
"""The geometry of packs, for branches of any lengths."""

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_consumer.engine.renderer.denoising.pack import Grid, Pack, lay_out, tokens_of

CPU = torch.device("cpu")
CHANNELS = 3

frame_counts = st.lists(st.integers(1, 60), min_size=1, max_size=7)
patches = st.integers(1, 4)


def packed(frames: list[int], patch: int, conditions: list[int] | None = None) -> Pack:
    grid = Grid(patch=patch, head_dim=8, theta=10_000.0)
    return lay_out(frames, conditions or [5] * len(frames), grid, CPU, torch.float32)


def parts_for(frames: list[int]) -> list[torch.Tensor]:
    """Number every frame of every branch, starting above the zero that fills odd ends."""
    numbers = 1 + torch.arange(sum(frames) * CHANNELS, dtype=torch.float32).reshape(-1, CHANNELS)
    return list(torch.split(numbers, frames))


@given(frame_counts, patches)
def test_split_undoes_join(frames: list[int], patch: int) -> None:
    pack, parts = packed(frames, patch), parts_for(frames)
    joined = pack.join(parts)
    assert joined.shape == (pack.tokens * patch, CHANNELS)
    for part, again in zip(parts, pack.split(joined), strict=True):
        assert torch.equal(part, again)


@given(frame_counts, patches)
def test_no_token_holds_frames_of_two_branches_and_only_zeros_are_added(frames: list[int], patch: int) -> None:
    pack = packed(frames, patch)
    names = [torch.full((count, 1), index + 1.0) for index, count in enumerate(frames)]
    tokens = pack.join(names).reshape(-1, patch)
    for token, branch in zip(tokens, pack.geometry.branch, strict=True):
        assert set(token.tolist()) <= {0.0, branch.item() + 1.0}
        assert token[0] == branch + 1
    assert (tokens != 0).sum() == sum(frames)


@given(frame_counts, patches, st.data())
def test_lengths_branches_and_positions_are_consistent(frames: list[int], patch: int, data: st.DataObject) -> None:
    conditions = data.draw(st.lists(st.integers(1, 90), min_size=len(frames), max_size=len(frames)))
    geometry = packed(frames, patch, conditions).geometry
    lengths = tokens_of(frames, patch)
    assert geometry.cu_seqlens.tolist() == [0, *accumulate(lengths), sum(lengths)]
    assert geometry.condition_cu_seqlens.tolist() == [0, *accumulate(conditions), sum(conditions)]
    assert geometry.cu_seqlens.dtype == geometry.condition_cu_seqlens.dtype == torch.int32
    assert (geometry.max_seqlen, geometry.condition_max_seqlen) == (max(lengths), max(conditions))
    assert len(geometry.branch) == len(geometry.cos) == len(geometry.sin) == sum(lengths)
    for branch, (start, end) in enumerate(pairwise(geometry.cu_seqlens.tolist())):
        assert set(geometry.branch[start:end].tolist()) <= {branch}


@settings(max_examples=30)
@given(frame_counts, patches)
def test_each_branch_counts_its_positions_from_the_start_as_it_does_alone(frames: list[int], patch: int) -> None:
    geometry = packed(frames, patch).geometry
    alone = [packed([count], patch).geometry for count in frames]
    assert torch.equal(geometry.cos, torch.cat([each.cos for each in alone]))
    assert torch.equal(geometry.sin, torch.cat([each.sin for each in alone]))


@pytest.mark.parametrize(
    ("frames", "patch", "tokens"), [(1, 2, 1), (2, 2, 1), (3, 2, 2), (15_000, 2, 7_500), (5, 1, 5)]
)
def test_an_odd_frame_has_a_token_of_its_own(frames: int, patch: int, tokens: int) -> None:
    assert tokens_of([frames], patch) == [tokens]


def test_the_last_branch_is_empty() -> None:
    """The compiler would treat a pack of one branch as a special case; there is always a second one."""
    geometry = packed([26], 2).geometry
    assert geometry.cu_seqlens.tolist() == [0, 13, 13]
    assert geometry.condition_cu_seqlens.tolist() == [0, 5, 5]
