# SPDX-License-Identifier: Apache-2.0
"""Size of vLLM's key-value cache when it starts beside the renderer. Pure."""

from typing import Final

UNCOUNTED_BYTES: Final = 1_200_000_000
"""Allowance for what torch does not count, or not yet: CUDA graphs of up to 15 batch sizes, workspaces of cuBLAS,
fragments. Not measured: vLLM's own estimates of the first were below 0.5 GB."""


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
