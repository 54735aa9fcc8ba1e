# SPDX-License-Identifier: Apache-2.0
"""Key-value cache of many sequences of different lengths, each a row of one rectangle.

A row is filled from the left. The next token is written at its end, and the mask hides everything beyond. So a sequence
can join or leave at any step without moving the others, there is no padding on the left, and columns beyond the longest
sequence are not read.

The rectangle grows and shrinks with its content, by blocks, so that it is not copied at every step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "one-query-sdpa"
"""The name of ``attend`` in transformers' registry."""

_ROW_BLOCK = 8
_WIDTH_BLOCK = 128
_READ_BLOCK = 64


class RowCache(Cache):  # type: ignore[misc]  # transformers has no types
    """A cache for ``layers`` layers. Call ``prefill`` or ``decode`` before each forward pass."""

    def __init__(self, layers: int) -> None:
        self._place = _CachePosition()
        self._rows: list[_RowLayer] = [_RowLayer(self._place) for _ in range(layers)]
        super().__init__(layers=self._rows)

    @staticmethod
    def area(rows: int, width: int) -> int:
        """Return the tokens of the rectangle for so many rows of so many tokens."""
        return _up(rows, _ROW_BLOCK) * _up(width, _WIDTH_BLOCK)

    @property
    def shape(self) -> tuple[int, int]:
        """Allocated rows and tokens per row."""
        return self._place.rows, self._place.width

    @property
    def size(self) -> int:
        """Allocated tokens."""
        return self._place.rows * self._place.width

    def read_width(self, longest: int) -> int:
        """Return the columns that a pass reads when the longest row has ``longest`` tokens, including the new one."""
        return min(_up(longest, _READ_BLOCK), self._place.width)

    def fit(self, rows: int, width: int) -> None:
        """Allocate ``rows`` rows of ``width`` tokens; memory is freed once less than half of it is needed."""
        place, (tall, wide) = self._place, (_up(rows, _ROW_BLOCK), _up(width, _WIDTH_BLOCK))
        if tall <= place.rows and wide <= place.width and self.size <= 2 * tall * wide:
            return
        place.rows, place.width = tall, wide
        for layer in self._rows:
            layer.resize()

    def prefill(self, first: int) -> None:
        """Announce a pass over new sequences from their start, for the rows from ``first`` on."""
        self._place.first, self._place.positions = first, None

    def decode(self, positions: Tensor, width: int) -> Tensor:
        """Announce a pass over one token of each of the first rows. Returns its mask, bool [rows, 1, 1, width].

        ``positions`` int64 [rows]: the number of tokens in each row. ``width``: see ``read_width``.
        """
        place = self._place
        place.positions, place.read = positions, width
        place.index = torch.arange(len(positions), device=positions.device)
        columns = torch.arange(width, device=positions.device)
        return (columns <= positions[:, None])[:, None, None]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy rows over others."""
        for layer in self._rows:
            layer.move(sources, targets)


class _CachePosition:
    """Position at which this pass reads and writes; shared by all layers."""

    rows = 0
    width = 0
    read = 0
    first = 0
    positions: Tensor | None = None
    index: Tensor


class _RowLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """Keys and values of one layer; [rows, heads, width, channels] each."""

    is_sliding = False

    def __init__(self, place: _CachePosition) -> None:
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values. Returns those that this pass attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place, (count, _heads, length, _channels) = self.place, key_states.shape
        if place.positions is None:
            self._start(slice(place.first, place.first + count), length, key_states, value_states)
            return key_states, value_states
        self.keys[place.index, :, place.positions] = key_states[:, :, 0]
        self.values[place.index, :, place.positions] = value_states[:, :, 0]
        return self.keys[:count, :, : place.read], self.values[:count, :, : place.read]

    def _start(self, rows: slice, length: int, key_states: Tensor, value_states: Tensor) -> None:
        """Fill new rows, and zero the rest of them: a masked NaN would still give a NaN."""
        for states, new in ((self.keys, key_states), (self.values, value_states)):
            states[rows, :, :length] = new
            states[rows, :, length:] = 0

    def resize(self) -> None:
        if self.is_initialized:
            self.keys, self.values = self._copy(self.keys), self._copy(self.values)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for states in (self.keys, self.values):
            states[targets] = states[sources]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.place.rows, like.shape[1], self.place.width, like.shape[3])

    def _copy(self, old: Tensor) -> Tensor:
        new = self._empty(old)
        rows, width = min(len(old), len(new)), min(old.shape[2], new.shape[2])
        new[:rows, :, :width] = old[:rows, :, :width]
        return new

    # Abstract methods of the base class. Masks come from ``RowCache``, so that their values are not used.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention in transformers' interface; without a mask it is causal.

    With one query per sequence, query heads that share keys (GQA) become queries of one head: with a mask, torch would
    otherwise need keys and values repeated for each, most of the memory traffic of a decoding step.
    """
    if query.shape[2] > 1:
        answer: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return answer
    rows, heads, _, channels = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], channels)
    mixed = functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=options.get("scaling")
    )
    return mixed.reshape(rows, 1, heads, channels), None


AttentionInterface.register(ATTENTION, attend)


def _up(count: int, block: int) -> int:
    return -(-count // block) * block
