# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: a step of the DiT, or the encoding of short texts, launched at once.

A DiT step launches some 500 kernels. The CPU needs 14 to 35 ms for that, the GPU 4 ms for a song of 30 seconds and 23
ms for one of 300; and what the CPU launches step by step, it cannot spend on preparing and decoding other songs.
Capturing a graph takes longer than launching a step, so that each is kept for its shape: a pack's songs change at
nearly every step.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch

from acestep_consumer.engine.captured_graph import CapturedGraph, pool_of
from acestep_consumer.engine.renderer.denoising.pack import Geometry, Pack, tokens_of
from acestep_consumer.engine.renderer.denoising.packed_dit import Branch, Condition, PackedDit
from acestep_consumer.policy.memory_budget import StepGraphLimits

Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Velocities of a pack, [tokens * patch, channels], of latents of that shape and of flow times [branches + 1]."""

# There is a graph for each multiple. The kernels of matrix products compute as many rows at once: the rest is free.
_TOKENS = 128
_MAX_BRANCHES = 72  # as many songs of ten seconds as there are tokens for, and what fills a pack up


class StepGraphs:
    """CUDA graphs of one DiT's step, one for each number of tokens in steps of ``_TOKENS``.

    All of them work on the same memory. A pack is copied there, and a branch of zeros, which no other branch sees,
    fills it up to the tokens of the graph: no graph is captured anew when songs join or leave. What tells the songs
    apart, the lengths of the branches, is data on the device.

    Args:
        dit: the DiT; its weights have to stay where they are.
        limits: the largest pack.
        capture: captures a function without arguments, and returns what replays it.
    """

    def __init__(self, dit: PackedDit, limits: StepGraphLimits, capture: Capture | None = None) -> None:
        self._dit = dit
        self._limits = limits
        self._capture = capture or self._captured
        self._memory: _StepMemory | None = None

    def has_room(self, branches: Sequence[Branch]) -> bool:
        """Whether a pack of these branches is within the limits. Two places are left for what fills it up."""
        return (
            sum(tokens_of([len(branch.latents) for branch in branches], self._dit.patch)) <= self._limits.tokens
            and len(branches) <= _MAX_BRANCHES - 2
            and sum(branch.condition.tokens for branch in branches) < self._limits.condition_tokens
        )

    def load(self, branches: Sequence[Branch]) -> tuple[Pack, Flow]:
        """Copy a pack that there is room for into the graphs' memory, in place of the one before.

        Returns its layout, and the function of its velocities. They are overwritten by the next call.
        """
        if self._memory is None:
            self._memory = _StepMemory(self._dit, self._limits, branches[0].condition.kv)
        pack = self._memory.load(branches)
        return pack, partial(self._replay, self._memory, pack.tokens)

    def _replay(self, memory: "_StepMemory", tokens: int, latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        memory.set_inputs(latents, times)
        if tokens not in memory.graphs:
            memory.graphs[tokens] = self._capture(partial(memory.compute, tokens))
        return memory.graphs[tokens]()

    @property
    def bytes(self) -> int:
        """Device memory of what the graphs work on, which the first pack allocates."""
        return 0 if self._memory is None else self._memory.bytes

    def clear(self) -> None:
        """Free all graphs and their memory."""
        self._memory = None

    def _captured(self, function: Callable[[], torch.Tensor]) -> CapturedGraph:
        # The very first call loads kernels, which is not allowed during capture.
        function()
        return CapturedGraph(function, (), pool_of(self._dit.device))


class _StepMemory:
    """The inputs of a step at fixed addresses, for packs of up to the most tokens, branches and condition tokens.

    ``kv``: keys and values of any condition, for their shape. ``graphs``: those that work on it, by tokens.
    """

    def __init__(self, dit: PackedDit, limits: StepGraphLimits, kv: torch.Tensor) -> None:
        self.graphs: dict[int, Callable[[], torch.Tensor]] = {}
        self._dit = dit
        tokens, channels = limits.tokens, dit.dit.config.audio_acoustic_hidden_dim
        rows = tokens * dit.patch
        make = partial(torch.zeros, device=dit.device, dtype=dit.dtype)
        self._latents, self._context = make(rows, channels), make(rows, 2 * channels)
        self._kv = kv.new_zeros(*kv.shape[:2], limits.condition_tokens, *kv.shape[3:])
        self._times = make(_MAX_BRANCHES)
        cu_seqlens = torch.zeros(2, _MAX_BRANCHES + 1, device=dit.device, dtype=torch.int32)
        self._geometry = Geometry(
            branch=torch.zeros(tokens, device=dit.device, dtype=torch.int64),
            cos=make(tokens, dit.dit.head_dim),
            sin=make(tokens, dit.dit.head_dim),
            cu_seqlens=cu_seqlens[0],
            condition_cu_seqlens=cu_seqlens[1],
            max_seqlen=tokens,
            condition_max_seqlen=limits.condition_tokens,
        )

    @property
    def bytes(self) -> int:
        own = (self._latents, self._context, self._kv, self._times)
        return sum(tensor.nbytes for tensor in (*own, *_tensors(self._geometry)))

    def load(self, branches: Sequence[Branch]) -> Pack:
        """Copy a pack of these branches; return its layout, with what fills it up."""
        patch = self._dit.patch
        frames = [len(branch.latents) for branch in branches]
        used = sum(tokens_of(frames, patch))
        left = -used % _TOKENS if used else _TOKENS
        # The branch of zeros has a condition of one token: softmax over none has no value.
        conditions = [branch.condition for branch in branches]
        one, none = Condition(self._kv[:, :, :1]), Condition(self._kv[:, :, :0])
        rest = _MAX_BRANCHES - len(branches) - 2
        pack = self._dit.lay_out([*frames, left * patch, *[0] * rest], [*conditions, one, *[none] * rest])
        for mine, given in zip(_tensors(self._geometry), _tensors(pack.geometry), strict=True):
            mine[: len(given)].copy_(given)
        context = pack.join([branch.context for branch in branches])
        self._context[: len(context)].copy_(context)
        self._context[len(context) :].zero_()
        self._latents.zero_()
        self._times.zero_()
        kv = [condition.kv for condition in conditions]
        torch.cat(kv, dim=2, out=self._kv[:, :, : sum(condition.tokens for condition in conditions)])
        return pack

    def set_inputs(self, latents: torch.Tensor, times: torch.Tensor) -> None:
        """Set latents and flow times of the pack's own branches."""
        self._latents[: len(latents)].copy_(latents)
        self._times[: len(times)].copy_(times)

    def compute(self, tokens: int) -> torch.Tensor:
        """Return the velocities of the loaded pack, which has so many tokens with what fills it up."""
        rows, whole = tokens * self._dit.patch, self._geometry
        branch, cos, sin = (part[:tokens] for part in (whole.branch, whole.cos, whole.sin))
        geometry = whole._replace(branch=branch, cos=cos, sin=sin, max_seqlen=tokens)
        pack = Pack((), self._dit.patch, geometry)
        return self._dit.velocities(pack, self._latents[:rows], self._context[:rows], self._kv, self._times)


def _tensors(geometry: Geometry) -> tuple[torch.Tensor, ...]:
    return geometry.branch, geometry.cos, geometry.sin, geometry.cu_seqlens, geometry.condition_cu_seqlens


_MAX_SHAPES = 8


class GraphedShapes:
    """A function with a CUDA graph for each of the shapes that it was last called with.

    Args:
        function: as for ``CapturedGraph``.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self._function = function
        self._graphs: OrderedDict[Hashable, CapturedGraph] = OrderedDict()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the function's result; it is overwritten by the next call with the same shapes."""
        key = tuple((*each.shape, each.dtype) for each in inputs)
        if key not in self._graphs:
            # The very first call loads kernels, which is not allowed during capture.
            self._function(*inputs)
            self._graphs[key] = CapturedGraph(self._function, inputs, pool=None)
        self._graphs.move_to_end(key)
        if len(self._graphs) > _MAX_SHAPES:  # the least recently used is freed
            self._graphs.popitem(last=False)
        return self._graphs[key](*inputs)

    def clear(self) -> None:
        """Free all graphs and their memory."""
        self._graphs.clear()


# Two kinds of blocks (with a window and without) for each model and each precision; torch's default limit is 8.
_RECOMPILE_LIMIT = 64


def raise_recompile_limit() -> None:
    """Allow torch to compile every kind of block. Per thread: call it on the thread that runs the model."""
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT  # noqa: SLF001 - torch's documented configuration module
    # Otherwise two lengths that happen to be equal in one pack become one symbol, and the next pack is compiled anew.
    torch.fx.experimental._config.use_duck_shape = False  # noqa: SLF001 - as above
