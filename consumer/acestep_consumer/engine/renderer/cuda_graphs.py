# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs for small packs and short texts, which take longer to launch than to compute.

A DiT step launches some 500 kernels. The CPU needs 14 ms for that, the GPU 4 ms for a song of 30 seconds. A graph
launches the whole step at once. Capturing one takes longer than launching a step, so that each is kept for its shape:
a pack's songs change at nearly every step.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch

from acestep_consumer.engine.captured_graph import CapturedGraph, pool_of
from acestep_consumer.engine.renderer.pack import Geometry, Pack, tokens_of
from acestep_consumer.engine.renderer.packed_dit import Branch, Condition, PackedDit

Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Velocities of a pack, [tokens * patch, channels], of latents of that shape and of flow times [branches + 1]."""

# There is a graph for each multiple; a song of 30 seconds has 375 tokens.
_TOKENS = 384
# Above this many a step takes longer to compute than to launch (measured on an H200): a graph would gain nothing.
_MAX_TOKENS = 6 * _TOKENS
_MAX_BRANCHES = 32
_MAX_CONDITION_TOKENS = 2048  # whose keys and values are 200 MB


class StepGraphs:
    """CUDA graphs of one DiT's step for small packs: one for each of a few numbers of tokens.

    All of them work on the same memory. A pack is copied there, and a branch of zeros, which no other branch sees,
    fills it up to the tokens of the graph: no graph is captured anew when songs join or leave. What tells the songs
    apart, the lengths of the branches, is data on the device.

    Args:
        dit: the DiT; its weights have to stay where they are.
        capture: captures a function without arguments, and returns what replays it.
    """

    def __init__(self, dit: PackedDit, capture: Capture | None = None) -> None:
        self._dit = dit
        self._capture = capture or self._captured
        self._memory: _StepMemory | None = None
        self._graphs: dict[int, Callable[[], torch.Tensor]] = {}

    def has_room(self, branches: Sequence[Branch]) -> bool:
        """Whether a pack of these branches is small enough. Two places are left for what fills it up."""
        return (
            sum(tokens_of([len(branch.latents) for branch in branches], self._dit.patch)) <= _MAX_TOKENS
            and len(branches) <= _MAX_BRANCHES - 2
            and sum(branch.condition.tokens for branch in branches) < _MAX_CONDITION_TOKENS
        )

    def load(self, branches: Sequence[Branch]) -> tuple[Pack, Flow]:
        """Copy a pack that there is room for into the graphs' memory, in place of the one before.

        Returns its layout, and the function of its velocities. They are overwritten by the next call.
        """
        if self._memory is None:
            self._memory = _StepMemory(self._dit, branches[0].condition.kv)
        pack = self._memory.load(branches)
        return pack, partial(self._replay, self._memory, pack.tokens)

    def _replay(
        self, memory: "_StepMemory", tokens: int, latents: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        memory.set_inputs(latents, times)
        if tokens not in self._graphs:
            self._graphs[tokens] = self._capture(partial(memory.compute, tokens))
        return self._graphs[tokens]()

    def clear(self) -> None:
        """Free all graphs and their memory."""
        self._graphs.clear()
        self._memory = None

    def _captured(self, function: Callable[[], torch.Tensor]) -> CapturedGraph:
        # The very first call loads kernels, which is not allowed during capture.
        function()
        return CapturedGraph(function, (), pool_of(self._dit.device))


class _StepMemory:
    """The inputs of a step at fixed addresses, for packs of up to the most tokens, branches and condition tokens.

    ``kv``: keys and values of any condition, for their shape.
    """

    def __init__(self, dit: PackedDit, kv: torch.Tensor) -> None:
        self._dit = dit
        channels, rows = dit.dit.config.audio_acoustic_hidden_dim, _MAX_TOKENS * dit.patch
        make = partial(torch.zeros, device=dit.device, dtype=dit.dtype)
        self._latents, self._context = make(rows, channels), make(rows, 2 * channels)
        self._kv = kv.new_zeros(*kv.shape[:2], _MAX_CONDITION_TOKENS, *kv.shape[3:])
        self._times = make(_MAX_BRANCHES)
        zeros = partial(torch.zeros, device=dit.device)
        self._branch = zeros(_MAX_TOKENS, dtype=torch.int64)
        self._cos, self._sin = make(_MAX_TOKENS, dit.dit.head_dim), make(_MAX_TOKENS, dit.dit.head_dim)
        self._cu_seqlens, self._condition_cu_seqlens = zeros(2, _MAX_BRANCHES + 1, dtype=torch.int32)

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
        for mine, given in zip(self._tensors(), pack.geometry, strict=False):
            mine[: len(given)].copy_(given)
        context = pack.join([branch.context for branch in branches])
        self._context[: len(context)].copy_(context)
        self._context[len(context) :].zero_()
        self._latents.zero_()
        self._times.zero_()
        kv = [condition.kv for condition in conditions]
        torch.cat(kv, dim=2, out=self._kv[:, :, : sum(condition.tokens for condition in conditions)])
        return pack

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors of a ``Geometry``, in its order."""
        return self._branch, self._cos, self._sin, self._cu_seqlens, self._condition_cu_seqlens

    def set_inputs(self, latents: torch.Tensor, times: torch.Tensor) -> None:
        """Set latents and flow times of the pack's own branches."""
        self._latents[: len(latents)].copy_(latents)
        self._times[: len(times)].copy_(times)

    def compute(self, tokens: int) -> torch.Tensor:
        """Return the velocities of the loaded pack, which has so many tokens with what fills it up."""
        rows, (branch, cos, sin, *cu_seqlens) = tokens * self._dit.patch, self._tensors()
        geometry = Geometry(branch[:tokens], cos[:tokens], sin[:tokens], *cu_seqlens, tokens, _MAX_CONDITION_TOKENS)
        pack = Pack((), self._dit.patch, geometry)
        return self._dit.velocities(pack, self._latents[:rows], self._context[:rows], self._kv, self._times)


class GraphedShapes:
    """A function with a CUDA graph for each of the shapes that it was last called with.

    Args:
        function: as for ``CapturedGraph``.
        max_graphs: graphs to keep; the least recently used is freed.
    """

    def __init__(self, function: Callable[..., torch.Tensor], max_graphs: int = 8) -> None:
        self._function = function
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[Hashable, CapturedGraph] = OrderedDict()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the function's result; it is overwritten by the next call with the same shapes."""
        key = tuple((*each.shape, each.dtype) for each in inputs)
        if key not in self._graphs:
            # The very first call loads kernels, which is not allowed during capture.
            self._function(*inputs)
            self._graphs[key] = CapturedGraph(self._function, inputs, pool=None)
        self._graphs.move_to_end(key)
        if len(self._graphs) > self._max_graphs:
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
