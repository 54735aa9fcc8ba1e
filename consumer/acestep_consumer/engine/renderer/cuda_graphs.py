# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs where launching costs more than computing: small packs, short texts.

A DiT step launches some 500 kernels. The CPU needs 14 ms for that, the GPU 4 ms for a song of 30 seconds. As a graph
the step is launched at once.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch

from acestep_consumer.engine.renderer.pack import Pack
from acestep_consumer.engine.renderer.packed_dit import PackedDit

# Above this many tokens a step computes for longer than it takes to launch, and a graph would only hold memory.
MOST_TOKENS = 8192


class CapturedGraph:
    """One call of a function, recorded: the same kernels on the same memory, replayed with new inputs.

    Args:
        function: takes the inputs and returns a tensor; nothing in it may wait for the device.
        inputs: tensors of the shapes that will come; the recording keeps copies of them.
        pool: memory shared with other recordings that are never needed at the same time.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], pool: Any) -> None:
        self._inputs = tuple(each.clone() for each in inputs)
        self._graph = torch.cuda.CUDAGraph()
        # Not with torch.cuda.graph: it hands all spare memory back to the driver first, which costs more than a pack.
        # Thread-local: other threads wait for copies of songs meanwhile, which a global recording would forbid.
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            self._output = function(*self._inputs)
        finally:
            self._graph.capture_end()

    @property
    def pool(self) -> Any:
        """The memory that the recording uses."""
        return self._graph.pool()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Replay. The result is overwritten by the next replay."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._output


class GraphedFlow:
    """The velocities of one pack, step after step; small packs as a graph, recorded at their first step."""

    def __init__(
        self, dit: PackedDit, pack: Pack, context: torch.Tensor, memory: torch.Tensor, *, graphed: bool
    ) -> None:
        self._dit = dit
        self._pack = pack
        self._context = context
        self._memory = memory
        self._graphed = graphed and pack.tokens <= MOST_TOKENS
        self._graph: CapturedGraph | None = None

    def __call__(self, latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Return velocities, [tokens * patch, channels], of latents of that shape at times [voices + 1]."""
        if not self._graphed:
            return self._compute(latents, times)
        if self._graph is None:
            self._graph = CapturedGraph(self._compute, (latents, times), _pool_of(latents.device))
        return self._graph(latents, times)

    def _compute(self, latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return self._dit.velocities(self._pack, latents, self._context, self._memory, times)


class GraphedShapes:
    """A function as one graph for each shape that it is called with, the latest few of them.

    Args:
        function: as for ``CapturedGraph``.
        most: recordings to keep.
    """

    def __init__(self, function: Callable[..., torch.Tensor], most: int = 8) -> None:
        self._function = function
        self._most = most
        self._graphs: OrderedDict[Hashable, CapturedGraph] = OrderedDict()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return what the function returns; overwritten by the next call with the same shapes."""
        key = tuple((*each.shape, each.dtype) for each in inputs)
        if key not in self._graphs:
            # The first call of all loads kernels, and a recording must not.
            self._function(*inputs)
            self._graphs[key] = CapturedGraph(self._function, inputs, pool=None)
        self._graphs.move_to_end(key)
        if len(self._graphs) > self._most:
            self._graphs.popitem(last=False)
        return self._graphs[key](*inputs)

    def forget(self) -> None:
        """Drop all recordings and their memory."""
        self._graphs.clear()


@cache
def _pool_of(device: torch.device) -> Any:
    """Return memory for graphs of packs, which come one after the other and can use it in turn."""
    keeper = CapturedGraph(torch.clone, (torch.zeros(1, device=device),), pool=torch.cuda.graph_pool_handle())
    _keepers.append(keeper)
    return keeper.pool


# A pool ends with its last graph; these never end.
_keepers: list[CapturedGraph] = []


# Two kinds of blocks (with a window and without), for each model and each precision; torch gives up at 8.
_MOST_KINDS = 64


def allow_many_kinds() -> None:
    """Set torch's compiler up. For the thread that will run what is compiled: its settings are per thread."""
    torch._dynamo.config.recompile_limit = _MOST_KINDS  # noqa: SLF001 - torch's documented configuration module
    # Lengths that happen to be equal in one pack would be taken for one and the same length, and differ in the next.
    torch.fx.experimental._config.use_duck_shape = False  # noqa: SLF001 - as above
