# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token of every song: guidance, penalty, temperature, top-k, top-p and a seeded draw.

Both backends use it, so that the same logits give the same tokens on either. Everything is written for many rows at
once: no loop over rows, no waiting for the device, and no branch on a value that lives there. What a step can leave out
is decided from the settings, which the host knows. Shapes are static, so a caller may wrap ``choose`` in
``torch.compile``, which fuses most of its passes, or record it in a CUDA graph.

A row's token depends on that row's logits, seed and step, and on nothing else, bit for bit. So nothing here adds up
floating point numbers along a row: how such a sum is split, and so its last bits, depends on how many rows there are.
Sums are of integers, which have no order.
"""

from collections.abc import Iterable, Mapping, Sequence
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
class Rows:
    """The sampling of each row of a batch, on the device, beside what the host knows of it.

    ``settings`` float32 [5, n], ``seed`` int64 [n]. ``greedy``, ``random``, ``penalised``, ``nucleus``: whether any row
    takes the likeliest token, draws, has a repetition penalty, has a top-p. ``most``: the largest top-k, rounded up to
    a power of two so that a compiled ``choose`` sees few values of it; 0 when no row has one.
    """

    samplings: tuple[Sampling, ...]
    settings: Tensor
    seed: Tensor
    greedy: bool
    random: bool
    penalised: bool
    nucleus: bool
    most: int

    @classmethod
    def of(cls, samplings: Iterable[Sampling], device: torch.device | str) -> Self:
        """Put the settings on the device: two small copies that the host does not wait for."""
        rows = tuple(samplings)
        columns = [(s.temperature, s.cfg_scale, s.top_k, s.top_p, s.repetition_penalty) for s in rows]
        settings = torch.tensor(columns, dtype=torch.float32).reshape(len(rows), 5).T.contiguous()
        seed = torch.tensor([_signed(s.seed) for s in rows], dtype=torch.int64)
        most = max((s.top_k for s in rows), default=0)
        return cls(
            samplings=rows,
            settings=settings.to(device, non_blocking=True),
            seed=seed.to(device, non_blocking=True),
            greedy=any(s.temperature == 0 for s in rows),
            random=any(s.temperature != 0 for s in rows),
            penalised=any(s.repetition_penalty != 1 for s in rows),
            nucleus=any(s.top_p < 1 and s.temperature != 0 for s in rows),
            most=1 << (most - 1).bit_length() if most > 0 else 0,
        )

    def __len__(self) -> int:
        return len(self.samplings)

    # Rows change when songs come and go, not at every step. Sending a few hundred bytes again costs less than indexing
    # on the device, and it keeps what the host knows right.

    def select(self, rows: Sequence[int]) -> Self:
        """The rows with these numbers, in this order."""
        return self.of((self.samplings[row] for row in rows), self.seed.device)

    def replace(self, changes: Mapping[int, Sampling]) -> Self:
        """The same rows, some with another sampling."""
        return self.of((changes.get(row, old) for row, old in enumerate(self.samplings)), self.seed.device)

    def join(self, newcomers: Iterable[Sampling]) -> Self:
        """These rows, then the newcomers."""
        return self.of((*self.samplings, *newcomers), self.seed.device)

    @property
    def temperature(self) -> Tensor:
        """Float32 [n, 1], as are the others; 0 takes the likeliest token."""
        return self.settings[0, :, None]

    @property
    def scale(self) -> Tensor:
        """How far guidance goes; 1 is the conditional alone."""
        return self.settings[1, :, None]

    @property
    def top_k(self) -> Tensor:
        """How many of the likeliest tokens stay; 0 is all."""
        return self.settings[2, :, None]

    @property
    def top_p(self) -> Tensor:
        """The probability that the tokens that stay must have together; 1 is all."""
        return self.settings[3, :, None]

    @property
    def penalty(self) -> Tensor:
        """What makes tokens that have been seen less likely; 1 is nothing."""
        return self.settings[4, :, None]


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance: u + s (c − u), in float32.

    Both [n, v], ``scale`` a number or [n, 1]. What the conditional masks stays masked; the unconditional's own mask has
    to allow whatever the conditional's does. A row that is its own unconditional comes out unchanged.
    """
    c, u = conditional.float(), unconditional.float()
    return torch.where(c == MASKED, c, u + scale * (c - u))


def choose(logits: Tensor, rows: Rows, step: Tensor, seen: Tensor | None = None, first: int = 0) -> Tensor:
    """Choose the next token of every row; int64 [n], columns of ``logits``.

    ``logits`` [n, v] of any floating type. A row without a finite largest number gets a column without a meaning, and
    disturbs no other. ``step`` int64 [n]: how many tokens each row has written. ``seen`` bool [n, v]: what the
    repetition penalty falls on; needed only when a row has one. ``first`` is the vocabulary's number of column 0: a
    slice of the logits draws what the whole would with the rest masked.
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


def _draw(logits: Tensor, rows: Rows, step: Tensor, first: int) -> Tensor:
    """Draw by a race: token i arrives after an exponential time of rate w_i; the first one wins with probability ∝ w_i.

    It is the Gumbel-max trick with one logarithm less. A draw from the cumulative sum would need one random number
    only, but then the smallest change of the logits shifts every border; here it changes a token only where two
    tokens arrive all but together, so that two devices or two backends mostly agree.
    """
    weights = _weights(logits, rows.temperature)
    if rows.most:
        weights = weights.masked_fill(~_likeliest(logits, rows.top_k, rows.most), 0)
    if rows.nucleus:
        weights = weights.masked_fill(~_nucleus(weights, rows.top_p), 0)
    return (weights / exponential(rows.seed, step, logits.shape[1], first)).argmax(-1)


def _weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities up to a factor: the likeliest token of a row has 1. Always finite, also for temperature 0."""
    heat = torch.where(temperature == 0, 1, temperature)
    return ((logits - logits.amax(-1, keepdim=True)) / heat).exp().nan_to_num(0)


def _likeliest(logits: Tensor, top_k: Tensor, most: int) -> Tensor:
    """Which tokens are among the ``top_k`` [n, 1] likeliest, or as likely as the last of them; bool [n, v]."""
    values = logits.topk(min(most, logits.shape[1]), dim=-1).values
    last = (top_k.long() - 1).clamp(0, values.shape[1] - 1)
    return (logits >= values.gather(1, last)) | (top_k <= 0)


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens are in the smallest set that has ``top_p`` [n, 1] of all the weight; at least one; bool [n, v].

    Among tokens of one weight the first ones go in, as they come in a stable sort. The sort only serves to find the
    last token that goes in; so nothing has to be put back into the order of the vocabulary. (Looking for that token by
    halving, or digit by digit with histograms, reads the weights many times: slower than the sort, on GPUs as well.)
    """
    descending, order = weights.sort(dim=-1, descending=True, stable=True)
    mass = (descending * 2.0**_MASS_BITS).long().cumsum(-1)
    wanted = (mass[:, -1:].double() * top_p.double()).ceil().long().clamp(min=1)
    # A row without any weight never gets there.
    last = torch.searchsorted(mass, wanted).clamp(max=weights.shape[1] - 1)
    least, highest = descending.gather(1, last), order.gather(1, last)
    columns = torch.arange(weights.shape[1], device=weights.device)
    return (weights > least) | ((weights == least) & (columns <= highest)) | (top_p >= 1)


def exponential(seed: Tensor, step: Tensor, count: int, first: int = 0) -> Tensor:
    """Random numbers of the exponential distribution for tokens ``first`` to ``first + count``; float32 [n, count].

    ``seed``, ``step`` int64 [n]. Each is a hash of seed, step and token, so no generator has a state to carry, and
    neither the size of the batch nor the place in it matters. All but the last logarithm is in integers, the same
    everywhere.
    """
    row = _mix64(_mix64(seed) + step)
    # No product comes before the first shift: torch.compile takes products of an arange for indices, which never wrap.
    token = _mix32(torch.arange(first, first + count, dtype=torch.int32, device=seed.device))
    multiplier, offset = (row >> 32).int() | 1, row.int()
    bits = (_mix32(token * multiplier[:, None] + offset[:, None]) >> 1) & 0x7FFFFFFF
    # Small numbers win the race, so the fine end of float32 has to be at 0: log1p(−u), not log(u).
    uniform = ((bits.float() + 0.5) * 2.0**-31).clamp(max=_LARGEST_UNIFORM)
    return -torch.log1p(-uniform)


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's last step, on int32: every bit of x changes each bit of the result with probability one half."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


def _mix64(x: Tensor) -> Tensor:
    """The step of SplitMix64, on int64: what ``_mix32`` does, for twice the bits."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _signed(seed: int) -> int:
    """The same 64 bits as a signed number, which is all that tensors hold."""
    return (seed + 2**63) % 2**64 - 2**63
