# SPDX-License-Identifier: Apache-2.0
"""CUDA graph of one function: what takes longer to launch than to compute is launched as one."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


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


@cache
def pool_of(device: torch.device) -> Any:
    """Return a memory pool for graphs of which one at a time is replayed, so that they can share it."""
    holder = CapturedGraph(torch.clone, (torch.zeros(1, device=device),), pool=torch.cuda.graph_pool_handle())
    _pool_holders.append(holder)
    return holder.pool


# A pool is freed with its last graph; these keep theirs.
_pool_holders: list[CapturedGraph] = []
