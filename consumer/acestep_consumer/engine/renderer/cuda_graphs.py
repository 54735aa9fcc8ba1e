# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs for small packs and short texts, which take longer to launch than to compute.

A DiT step launches some 500 kernels. The CPU needs 14 ms for that, the GPU 4 ms for a song of 30 seconds. A graph
launches the whole step at once. Capturing one takes as long as launching a step or two, at each change of a pack's
songs.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from acestep_consumer.engine.captured_graph import CapturedGraph, pool_of
from acestep_consumer.engine.renderer.pack import Pack
from acestep_consumer.engine.renderer.packed_dit import PackedDit

# Above this many tokens a step takes longer to compute than to launch (measured on an H200): a graph would gain
# nothing, take time to record, and hold memory.
_MAX_GRAPHED_TOKENS = 2304

# Fewer steps are launched in less time than their graph is captured: songs that follow one another in a pack change it
# at nearly every step.
_FEWEST_GRAPHED_STEPS = 3


def worth_a_graph(tokens: int, steps: int) -> bool:
    """Whether a pack of so many tokens is stepped faster by a graph, if it stays as it is for so many steps."""
    return tokens <= _MAX_GRAPHED_TOKENS and steps >= _FEWEST_GRAPHED_STEPS


class GraphedFlow:
    """Computes the velocities of one pack, step after step; ``graphed``: by a graph, captured at the first step."""

    def __init__(self, dit: PackedDit, pack: Pack, context: torch.Tensor, kv: torch.Tensor, *, graphed: bool) -> None:
        self._dit = dit
        self._pack = pack
        self._context = context
        self._kv = kv
        self._graphed = graphed
        self._graph: CapturedGraph | None = None

    def __call__(self, latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Return velocities, [tokens * patch, channels], of latents of that shape at times [branches + 1]."""
        if not self._graphed:
            return self._compute(latents, times)
        if self._graph is None:
            self._graph = CapturedGraph(self._compute, (latents, times), pool_of(latents.device))
        return self._graph(latents, times)

    def _compute(self, latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return self._dit.velocities(self._pack, latents, self._context, self._kv, times)


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
