# SPDX-License-Identifier: Apache-2.0
"""Attention over many sequences that lie end to end: each token sees the tokens of its own sequence and no other.

A rectangle with padding would not do: the model has no padding mask, so that padding changes the song. Where sequences
begin is data on the device, not a mask and not a shape, so that one compiled model serves every composition.

Three ways, the fastest that the device has: FlashAttention 3 (Hopper, from vLLM's build), torch's own variable-length
FlashAttention, and torch's ordinary attention called once per sequence. All three compute the same; the last one runs
anywhere and in any precision.
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

EVERYWHERE = -1  # as a window: no window
_HALF = (torch.float16, torch.bfloat16)
_AMPERE, _HOPPER = 8, 9
_FLASH_3 = "_flash_attention_3"  # what vLLM's folder is imported as

Kernel = Callable[..., torch.Tensor]


@torch.library.custom_op("acestep::attend", mutates_args=())
def attend(  # noqa: PLR0913, PLR0917 - an operator of torch has plain arguments, in their order
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest_query: int,
    longest_key: int,
    window: int,
    scale: float,
) -> torch.Tensor:
    """Attend within sequences.

    Args:
        query: [tokens, heads, dim].
        key: [key tokens, key heads, dim]; each key head serves ``heads / key heads`` heads.
        value: as ``key``.
        query_bounds: [sequences + 1], int32: sequence ``i`` is ``query_bounds[i]`` to ``query_bounds[i + 1]``.
        key_bounds: the same for keys.
        longest_query: tokens of the longest sequence.
        longest_key: the same for keys.
        window: tokens that a token sees on either side, or ``EVERYWHERE``.
        scale: factor on the logits.

    Returns:
        [tokens, heads, dim].
    """
    kernel = fastest(query.device.type, query.device.index, query.dtype)
    return kernel(query, key, value, query_bounds, key_bounds, longest_query, longest_key, window, scale)


@attend.register_fake
def _shape_of_attend(query: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@cache
def fastest(device: str, index: int | None, dtype: torch.dtype) -> Kernel:
    """Choose how a device attends in a precision. Asked by type and number, which can be remembered."""
    if device != "cuda" or dtype not in _HALF or torch.version.cuda is None:
        return one_by_one
    major, _ = torch.cuda.get_device_capability(index)
    if major < _AMPERE:
        return one_by_one
    return (_flash_3() if major == _HOPPER else None) or _flash() or one_by_one


def name_of(kernel: Kernel) -> str:
    """Return what people call a way to attend."""
    return kernel.__name__.replace("_", " ")


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *where: Any) -> torch.Tensor:
    """Attend with torch's ordinary attention, a call per sequence."""
    query_bounds, key_bounds, _, _, window, scale = where
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    starts, key_starts = query_bounds.tolist(), key_bounds.tolist()
    for start, end, key_start, key_end in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        if start == end:
            continue
        q, k, v = (
            part.transpose(0, 1)[None] for part in (query[start:end], key[key_start:key_end], value[key_start:key_end])
        )
        mask = None if window == EVERYWHERE else _band(end - start, window, query.device)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        result[start:end] = attended[0].transpose(0, 1)
    return result


def _band(tokens: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Which tokens see each other, [tokens, tokens]; None when all do."""
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
    # Later versions want to be told what earlier ones just did.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *where: Any) -> torch.Tensor:
        *bounds, window, scale = where
        attended: Any = varlen_attn(query, key, value, *bounds, scale=scale, window_size=(window, window), **grouped)
        return torch.as_tensor(attended)

    return flash


def _flash_3() -> Kernel | None:
    """Return FlashAttention 3 as vLLM ships it, half again as fast on a Hopper; None without vLLM.

    vLLM itself is not imported: that rewires torch's compiler to vLLM's needs.
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
        query_bounds, key_bounds, longest_query, longest_key, window, scale = where
        attended: torch.Tensor = attend_varlen(
            query,
            key,
            value,
            longest_query,
            query_bounds,
            longest_key,
            key_bounds,
            softmax_scale=scale,
            window_size=[window, window],
            fa_version=3,
        )
        return attended

    return flash_3
