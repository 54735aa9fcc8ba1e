# SPDX-License-Identifier: Apache-2.0
"""Sampling: guidance, penalty, temperature, top-k, top-p and a seeded draw, for a batch of rows.

Both backends use it, so that the same logits give the same tokens on either. Everything is written for many rows at
once: no loop over rows, no synchronization with the device, and no branch on a value that is there. Which parts a step
can skip is decided from the parameters, which the host knows. Shapes are static, so a caller may wrap ``choose`` in
``torch.compile``, which fuses most of its passes, or record it in a CUDA graph.

A row's token depends on that row's logits, seed and step, and on nothing else, bit for bit. Therefore nothing here sums
floating point numbers along a row: the order of such a sum, and so its last bits, depends on the number of rows. Sums
are of integers, whose order does not matter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from acestep_consumer.engine.planner.backend import Sampling

MASKED = float("-inf")
"""The logit of a token that must not be chosen."""

_MASS_BITS = 40
"""Weights are at most 1 and get this many binary places as integers: 2^23 of them still fit into 63 bits."""

_LARGEST_UNIFORM = 1 - 2**-24


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling parameters of each row of a batch, on the device and on the host.

    ``settings`` float32 [5, n], ``seed`` int64 [n]. ``greedy``, ``random``, ``penalised``, ``nucleus``: whether any row
    is greedy, is sampled, has a repetition penalty, has a top-p. ``max_top_k``: the largest top-k, rounded up to a
    power of two so that a compiled ``choose`` sees few values of it; 0 when no row has one.
    """

    settings: Tensor
    seed: Tensor
    greedy: bool
    random: bool
    penalised: bool
    nucleus: bool
    max_top_k: int

    @classmethod
    def of(cls, samplings: Iterable[Sampling], device: torch.device | str) -> Self:
        """Copy the parameters to the device: two small copies that the host does not wait for."""
        rows = tuple(samplings)
        columns = [(s.temperature, s.cfg_scale, s.top_k, s.top_p, s.repetition_penalty) for s in rows]
        settings = torch.tensor(columns, dtype=torch.float32).reshape(len(rows), 5).T.contiguous()
        seed = torch.tensor([_signed(s.seed) for s in rows], dtype=torch.int64)
        max_top_k = max((s.top_k for s in rows), default=0)
        return cls(
            settings=settings.to(device, non_blocking=True),
            seed=seed.to(device, non_blocking=True),
            greedy=any(s.temperature == 0 for s in rows),
            random=any(s.temperature != 0 for s in rows),
            penalised=any(s.repetition_penalty != 1 for s in rows),
            nucleus=any(s.top_p < 1 and s.temperature != 0 for s in rows),
            max_top_k=1 << (max_top_k - 1).bit_length() if max_top_k > 0 else 0,
        )

    @property
    def temperature(self) -> Tensor:
        """Float32 [n, 1], as are the others; 0 is greedy."""
        return self.settings[0, :, None]

    @property
    def scale(self) -> Tensor:
        """Guidance scale; 1 is the conditional branch alone."""
        return self.settings[1, :, None]

    @property
    def top_k(self) -> Tensor:
        """Number of likeliest tokens to keep; 0 is all."""
        return self.settings[2, :, None]

    @property
    def top_p(self) -> Tensor:
        """Total probability of the tokens to keep; 1 is all."""
        return self.settings[3, :, None]

    @property
    def penalty(self) -> Tensor:
        """Repetition penalty; 1 is none."""
        return self.settings[4, :, None]


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Apply classifier-free guidance: u + s (c − u), in float32.

    Both [n, v], ``scale`` a number or [n, 1]. Tokens that the conditional masks stay masked; the unconditional must
    allow all that the conditional does. A row that is its own unconditional is returned unchanged.
    """
    c, u = conditional.float(), unconditional.float()
    return torch.where(c == MASKED, c, u + scale * (c - u))


def choose(logits: Tensor, rows: RowSampling, step: Tensor, seen: Tensor | None = None, first: int = 0) -> Tensor:
    """Choose the next token of every row; int64 [n], columns of ``logits``.

    ``logits`` [n, v] of any floating type. A row without a finite maximum gets an arbitrary column, and affects no
    other. ``step`` int64 [n]: the number of tokens that each row has generated. ``seen`` bool [n, v]: the
    tokens that the repetition penalty applies to; needed only when a row has one. ``first`` is the token id of column
    0: a slice of the logits gives the same token as all logits with the rest masked.
    """
    logits = logits.float()
    if rows.penalised and seen is not None:
        logits = _penalise(logits, seen, rows.penalty)
    if not rows.random:
        return logits.argmax(-1)
    drawn = _draw(logits, rows, step, first)
    return torch.where(rows.temperature[:, 0] == 0, logits.argmax(-1), drawn) if rows.greedy else drawn


def _penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _draw(logits: Tensor, rows: RowSampling, step: Tensor, first: int) -> Tensor:
    """Draw with exponential races: token i finishes after a time of rate w_i; the first has probability ∝ w_i.

    It is the Gumbel-max trick with one logarithm less. A draw from the cumulative sum would need one random number
    only, but there the smallest change of the logits shifts every boundary; here it changes a token only where two
    tokens finish almost together, so that two devices or two backends mostly agree.
    """
    weights = _weights(logits, rows.temperature)
    if rows.max_top_k:
        weights = weights.masked_fill(~_likeliest(logits, rows.top_k, rows.max_top_k), 0)
    if rows.nucleus:
        weights = weights.masked_fill(~_nucleus(weights, rows.top_p), 0)
    return (weights / exponential(rows.seed, step, logits.shape[1], first)).argmax(-1)


def _weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return probabilities up to a factor: a row's likeliest token has 1. Always finite, also at temperature 0."""
    divisor = torch.where(temperature == 0, 1, temperature)
    return ((logits - logits.amax(-1, keepdim=True)) / divisor).exp().nan_to_num(0)


def _likeliest(logits: Tensor, top_k: Tensor, max_top_k: int) -> Tensor:
    """Return which tokens are among the ``top_k`` [n, 1] likeliest, or as likely as the last of them; bool [n, v]."""
    values = logits.topk(min(max_top_k, logits.shape[1]), dim=-1).values
    last = (top_k.long() - 1).clamp(0, values.shape[1] - 1)
    return (logits >= values.gather(1, last)) | (top_k <= 0)


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Return which tokens are in the smallest set with ``top_p`` [n, 1] of all weight; at least one; bool [n, v].

    Among tokens of equal weight the first ones are taken, as in a stable sort. The sort only finds the last token of
    the set; so nothing has to be put back into the order of the vocabulary. (Bisection, or a radix select with
    histograms, reads the weights many times: slower than the sort, on GPUs as well.)
    """
    descending, order = weights.sort(dim=-1, descending=True, stable=True)
    mass = (descending * 2.0**_MASS_BITS).long().cumsum(-1)
    wanted = (mass[:, -1:].double() * top_p.double()).ceil().long().clamp(min=1)
    # A row without any weight never reaches it.
    last = torch.searchsorted(mass, wanted).clamp(max=weights.shape[1] - 1)
    least, highest = descending.gather(1, last), order.gather(1, last)
    columns = torch.arange(weights.shape[1], device=weights.device)
    return (weights > least) | ((weights == least) & (columns <= highest)) | (top_p >= 1)


def exponential(seed: Tensor, step: Tensor, count: int, first: int = 0) -> Tensor:
    """Return exponentially distributed numbers for tokens ``first`` to ``first + count``; float32 [n, count].

    ``seed``, ``step`` int64 [n]. Each is a hash of seed, step and token: there is no generator state, and neither the
    size of the batch nor the row matters. All but the last logarithm is in integers, and so the same on every device.
    """
    row = _mix64(_mix64(seed) + step)
    # No product before the first shift: torch.compile treats products of an arange as indices, which never wrap.
    token = _mix32(torch.arange(first, first + count, dtype=torch.int32, device=seed.device))
    multiplier, offset = (row >> 32).int() | 1, row.int()
    bits = (_mix32(token * multiplier[:, None] + offset[:, None]) >> 1) & 0x7FFFFFFF
    # The smallest number wins, so float32 must be most precise near 0: log1p(−u), not log(u).
    uniform = ((bits.float() + 0.5) * 2.0**-31).clamp(max=_LARGEST_UNIFORM)
    return -torch.log1p(-uniform)


def _mix32(x: Tensor) -> Tensor:
    """Apply MurmurHash3's finalizer to int32: each input bit flips each output bit with probability one half."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


def _mix64(x: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer to int64, as ``_mix32`` for twice the bits."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _signed(seed: int) -> int:
    """Return the same 64 bits as a signed number, as tensors need it."""
    return (seed + 2**63) % 2**64 - 2**63


def seen_tokens(known: Sequence[Iterable[int]], ids: range) -> Tensor:
    """Return which of the tokens ``ids`` are in each sequence's known ones; bool [sequences, ids]."""
    at = [(row, token - ids.start) for row, tokens in enumerate(known) for token in tokens if token in ids]
    seen = torch.zeros(len(known), len(ids), dtype=torch.bool)
    if at:
        seen[tuple(torch.tensor(at).T)] = True
    return seen
