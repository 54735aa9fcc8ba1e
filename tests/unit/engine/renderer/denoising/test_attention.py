# SPDX-License-Identifier: Apache-2.0
"""Attention over concatenated sequences against one dense mask over all of them."""

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from acestep_consumer.engine.renderer.denoising.attention import (
    NO_WINDOW,
    attend,
    fastest_kernel,
    name_of,
    sdpa_per_sequence,
    weights_of,
)

HEADS, KEY_HEADS, DIM, SCALE = 4, 2, 8, 0.37

Lengths = Sequence[int]


def inputs_for(queries: Lengths, keys: Lengths) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(sum(queries) + sum(keys))
    shapes = (sum(queries), HEADS, DIM), (sum(keys), KEY_HEADS, DIM), (sum(keys), KEY_HEADS, DIM)
    query, key, value = (torch.randn(shape, generator=noise) for shape in shapes)
    return query, key, value


def cu_seqlens_of(lengths: Lengths) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed(queries: Lengths, keys: Lengths, window: int) -> torch.Tensor:
    lengths = cu_seqlens_of(queries), cu_seqlens_of(keys), max(queries), max(keys)
    found: torch.Tensor = attend(*inputs_for(queries, keys), *lengths, window, SCALE)
    return found


def dense(queries: Lengths, keys: Lengths, window: int) -> torch.Tensor:
    """Attend over everything at once, with a mask of the allowed pairs."""
    owner, key_owner = (
        torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each)) for each in (queries, keys)
    )
    mask = owner[:, None] == key_owner
    if window != NO_WINDOW:
        mask &= (torch.arange(sum(queries))[:, None] - torch.arange(sum(keys))).abs() <= window
    query, key, value = inputs_for(queries, keys)
    key, value = (part.repeat_interleave(HEADS // KEY_HEADS, dim=1) for part in (key, value))
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)
    return attended[0].transpose(0, 1)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    window=st.sampled_from([NO_WINDOW, 0, 1, 7, 38, 39, 40, 128]),
)
def test_a_token_attends_to_its_own_sequence_within_its_window(lengths: list[int], window: int) -> None:
    found = packed([*lengths, 0], [*lengths, 0], window)
    torch.testing.assert_close(found, dense(lengths, lengths, window), rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=6))
def test_a_token_attends_to_its_own_condition_and_all_of_it(pairs: list[tuple[int, int]]) -> None:
    queries, keys = [list(each) for each in zip(*pairs, strict=True)]
    found = packed([*queries, 0], [*keys, 0], NO_WINDOW)
    torch.testing.assert_close(found, dense(queries, keys, NO_WINDOW), rtol=0, atol=1e-5)


def test_empty_sequences_between_others_change_nothing() -> None:
    with_empty, without = packed([5, 0, 9, 0], [5, 0, 9, 0], 3), packed([5, 9], [5, 9], 3)
    torch.testing.assert_close(with_empty, without, rtol=0, atol=0)


def test_torch_accepts_the_operator_and_its_shape_for_the_compiler() -> None:
    cu_seqlens = cu_seqlens_of([4, 3])
    torch.library.opcheck(attend, (*inputs_for([4, 3], [4, 3]), cu_seqlens, cu_seqlens, 4, 4, 2, SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpu_attends_one_sequence_at_a_time(dtype: torch.dtype) -> None:
    assert fastest_kernel("cpu", None, dtype) is sdpa_per_sequence
    assert name_of(sdpa_per_sequence) == "sdpa per sequence"


def test_the_weights_of_a_head_are_those_that_its_attention_is_made_with() -> None:
    query, key, value = torch.randn(5, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    starts, key_starts = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 7], dtype=torch.int32)
    attended = sdpa_per_sequence(query, key, value, starts, key_starts, 5, 7, NO_WINDOW, 0.3)

    weights = weights_of(query.movedim(1, 0), key.movedim(1, 0).repeat_interleave(2, dim=0), 0.3)
    for head in range(4):
        torch.testing.assert_close(weights[head] @ value[:, head // 2], attended[:, head])
