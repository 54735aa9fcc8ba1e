# SPDX-License-Identifier: Apache-2.0
"""Variable-length attention over concatenated sequences: each token attends to its own sequence only.

A padded rectangle would not do: the model has no padding mask, so that padding changes the song. The sequences'
lengths are data on the device, neither a mask nor a shape, so that one compiled model serves every batch.

There are three kernels, of which the device's fastest is used: FlashAttention 3 (Hopper, from vLLM's build), torch's
own variable-length FlashAttention, and torch's ordinary attention called once per sequence. All three compute the same;
the last one runs anywhere and in any precision.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NO_WINDOW = -1  # as FlashAttention has it
_HALF = (torch.float16, torch.bfloat16)
_AMPERE, _HOPPER = 8, 9
_FLASH_3 = "_flash_attention_3"  # the name under which vLLM's folder is imported

Kernel = Callable[..., torch.Tensor]


@torch.library.custom_op("acestep::attend", mutates_args=())
def attend(  # noqa: PLR0913, PLR0917 - an operator of torch has plain arguments, in their order
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window: int,
    scale: float,
) -> torch.Tensor:
    """Attend within each sequence.

    Args:
        query: [tokens, heads, dim].
        key: [key tokens, key heads, dim]; ``heads / key heads`` query heads share one (GQA).
        value: as ``key``.
        cu_seqlens_q: [sequences + 1], int32: sequence ``i`` is ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]``.
        cu_seqlens_k: the same for keys.
        max_seqlen_q: tokens of the longest sequence.
        max_seqlen_k: the same for keys.
        window: tokens on either side that a token attends to, or ``NO_WINDOW``.
        scale: factor on the logits.

    Returns:
        [tokens, heads, dim].
    """
    kernel = fastest_kernel(query.device.type, query.device.index, query.dtype)
    return kernel(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale)


@attend.register_fake
def _shape_of_attend(query: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@cache
def fastest_kernel(device: str, index: int | None, dtype: torch.dtype) -> Kernel:
    """Choose the kernel for a device and a precision. The device comes as type and index, which can be cached."""
    if device != "cuda" or dtype not in _HALF or torch.version.cuda is None:
        return sdpa_per_sequence
    major, _ = torch.cuda.get_device_capability(index)
    if major < _AMPERE:
        return sdpa_per_sequence
    return (_flash_3() if major == _HOPPER else None) or _flash() or sdpa_per_sequence


def name_of(kernel: Kernel) -> str:
    """Return a kernel's name for the log."""
    return kernel.__name__.replace("_", " ")


def sdpa_per_sequence(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *where: Any) -> torch.Tensor:
    """Attend with torch's ordinary attention (SDPA), one call per sequence."""
    cu_seqlens_q, cu_seqlens_k, _, _, window, scale = where
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for start, end, key_start, key_end in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        if start == end:
            continue
        q, k, v = (
            part.transpose(0, 1)[None] for part in (query[start:end], key[key_start:key_end], value[key_start:key_end])
        )
        mask = None if window == NO_WINDOW else _window_mask(end - start, window, query.device)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        result[start:end] = attended[0].transpose(0, 1)
    return result


def weights_of(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the attention weights of some heads, float32 [heads, queries, keys], for one sequence without a window.

    ``query``: [heads, queries, dim] and ``key``: [heads, keys, dim], the key of each head; float32.
    """
    return torch.matmul(query * scale, key.mT).softmax(dim=-1)


def _window_mask(tokens: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Return the mask of a sliding window, bool [tokens, tokens]; None when it covers all tokens."""
    if tokens <= window + 1:
        return None
    at = torch.arange(tokens, device=device)
    return (at[:, None] - at).abs() <= window


def _flash() -> Kernel | None:
    """Return torch's variable-length FlashAttention; None before torch 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - torch 2.10 lacks it
    except ImportError:
        return None
    # Later versions need the flag for what earlier ones did by themselves.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *where: Any) -> torch.Tensor:
        *cu_seqlens, window, scale = where
        attended: Any = varlen_attn(
            query, key, value, *cu_seqlens, scale=scale, window_size=(window, window), **grouped
        )
        return torch.as_tensor(attended)

    return flash


def _flash_3() -> Kernel | None:
    """Return FlashAttention 3 as vLLM ships it, 1.5 times as fast on a Hopper GPU; None without vLLM.

    vLLM itself is not imported: importing it changes the settings of torch's compiler.
    """
    vllm = find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        return None
    package = ModuleType(_FLASH_3)
    package.__path__ = [str(Path(vllm.submodule_search_locations[0], "vllm_flash_attn"))]
    sys.modules[_FLASH_3] = package
    try:
        interface = import_module(f"{_FLASH_3}.flash_attn_interface")
        attend_varlen, is_there = interface.flash_attn_varlen_func, interface.FA3_AVAILABLE
    except (ImportError, OSError, AttributeError):
        return None
    if not is_there:
        return None

    def flash_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *where: Any) -> torch.Tensor:
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale = where
        attended: torch.Tensor = attend_varlen(
            query,
            key,
            value,
            max_seqlen_q,
            cu_seqlens_q,
            max_seqlen_k,
            cu_seqlens_k,
            softmax_scale=scale,
            window_size=[window, window],
            fa_version=3,
        )
        return attended

    return flash_3
