# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs for small packs and short texts, which take longer to launch than to compute.

A DiT step launches some 500 kernels. The CPU needs 14 ms for that, the GPU 4 ms for a song of 30 seconds. A graph
launches the whole step at once. Recording one takes 0.2 s, at each change of a pack's songs.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch

from acestep_consumer.engine.renderer.pack import Pack
from acestep_consumer.engine.renderer.packed_dit import PackedDit

# Above this many tokens a step takes longer to compute than to launch (measured on an H200): a graph would gain
# nothing, take time to record, and hold memory.
MAX_GRAPHED_TOKENS = 2304


class CapturedGraph:
    """One captured call of a function: the same kernels on the same memory, replayed with new inputs.

    Args:
        function: takes the inputs and returns a tensor, without synchronizing with the device.
        inputs: tensors of the shapes that will be passed; the graph keeps copies of them.
        pool: memory shared with other graphs that are never replayed at the same time; None: its own.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], pool: Any) -> None:
        self._inputs = tuple(each.clone() for each in inputs)
        self._graph = torch.cuda.CUDAGraph()
        # Not with torch.cuda.graph: it first returns all cached memory to the driver, which takes longer than a step.
        # Thread-local: other threads synchronize with copies of songs meanwhile, which a global capture forbids.
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            self._output = function(*self._inputs)
        finally:
            self._graph.capture_end()

    @property
    def pool(self) -> Any:
        """The memory pool of the graph."""
        return self._graph.pool()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Replay the graph. The result is overwritten by the next replay."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._output


class GraphedFlow:
    """Computes the velocities of one pack, step after step; small packs as a graph, captured at their first step."""

    def __init__(self, dit: PackedDit, pack: Pack, context: torch.Tensor, kv: torch.Tensor, *, graphed: bool) -> None:
        self._dit = dit
        self._pack = pack
        self._context = context
        self._kv = kv
        self._graphed = graphed and pack.tokens <= MAX_GRAPHED_TOKENS
        self._graph: CapturedGraph | None = None

    def __call__(self, latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Return velocities, [tokens * patch, channels], of latents of that shape at times [branches + 1]."""
        if not self._graphed:
            return self._compute(latents, times)
        if self._graph is None:
            self._graph = CapturedGraph(self._compute, (latents, times), _pool_of(latents.device))
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


@cache
def _pool_of(device: torch.device) -> Any:
    """Return the memory pool of all packs' graphs: one pack is stepped at a time, so that they can share it."""
    holder = CapturedGraph(torch.clone, (torch.zeros(1, device=device),), pool=torch.cuda.graph_pool_handle())
    _pool_holders.append(holder)
    return holder.pool


# A pool is freed with its last graph; these keep theirs.
_pool_holders: list[CapturedGraph] = []


# Two kinds of blocks (with a window and without) for each model and each precision; torch's default limit is 8.
_RECOMPILE_LIMIT = 64


def raise_recompile_limit() -> None:
    """Allow torch to compile every kind of block. Per thread: call it on the thread that runs the model."""
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT  # noqa: SLF001 - torch's documented configuration module
    # Otherwise two lengths that happen to be equal in one pack become one symbol, and the next pack is compiled anew.
    torch.fx.experimental._config.use_duck_shape = False  # noqa: SLF001 - as above
