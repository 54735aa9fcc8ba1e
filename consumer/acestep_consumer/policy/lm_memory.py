# SPDX-License-Identifier: Apache-2.0
"""The LM's memory on a GPU: rows of vLLM's batch, what it takes beside weights, keys and values. Pure.

The planner sizes vLLM by these rules, and ``plan`` counts the same.
"""

from typing import Final

CONTEXT: Final = 8192
"""Tokens of one request at most. vLLM does not start unless its cache has room for as many."""

ROWS, MORE_ROWS = 128, 256
"""Requests in one step; a guided song is two."""

PROCESSOR_BYTES: Final = 4_000_000
"""Memory of the logits processor per row, at most: a few copies of its logits. vLLM does not count it."""

TRIAL_BYTES: Final = 1_000_000_000
"""What vLLM's trial pass finds beside the weights: context, activations, CUDA graphs. An allowance, not measured."""

UNCOUNTED_BYTES: Final = 1_200_000_000
"""Kept back where vLLM starts beside the renderer, for what torch does not count, or not yet: CUDA graphs of up to 15
batch sizes, workspaces of cuBLAS, fragments. Not measured: vLLM's own estimates of the first were below 0.5 GB."""

_LONG_SONG_TOKENS = 2 * 1900
"""Of five minutes: 1,500 codes and a prompt, in both rows of a guided sequence."""


def rows_for(memory: float, token_bytes: int) -> int:
    """Return the rows for so many bytes, at so many for a token's keys and values: more where long songs fill them."""
    return MORE_ROWS if 2 * memory / (_LONG_SONG_TOKENS * token_bytes) > ROWS else ROWS


def beside_weights(rows: int, *, beside: bool) -> int:
    """Return the bytes that vLLM takes beside weights, keys and values. ``beside``: it starts beside the renderer."""
    return TRIAL_BYTES + rows * PROCESSOR_BYTES + (UNCOUNTED_BYTES if beside else 0)


def cache_bytes(share: int, peak: int) -> int:
    """Return the bytes for keys and values, of a share of the device and the peak of a trial pass, weights included.

    Raises:
        ValueError: there is nothing left.
    """
    left = share - peak - UNCOUNTED_BYTES
    if left <= 0:
        raise ValueError(
            f"the language model's share of the memory, {share / 1e9:.1f} GB, has no room for keys and values beside "
            f"{peak / 1e9:.1f} GB of weights and activations"
        )
    return left
