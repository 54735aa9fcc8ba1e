# SPDX-License-Identifier: Apache-2.0
"""CUDA graph of a repeated forward pass, which removes the launch overhead.

A decoding step of a small model takes a GPU less time than the host needs to launch its thousand kernels.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_RUNS_BEFORE_CAPTURE = 2
"""Runs of a pass before it is captured: a capture costs about as much as a run."""


class CudaGraph:
    """Runs a forward pass, and replays it as a graph from the third time in a row on; on CPUs it only runs it."""

    def __init__(self, device: torch.device) -> None:
        self._enabled = device.type == "cuda"
        self._key: Hashable = None
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Return the result of ``work``; a replay overwrites the tensor returned before.

        ``key`` identifies everything that a graph fixes: shapes, and the tensors that ``work`` reads and writes.
        """
        if key != self._key:
            self.clear()
            self._key = key
        if self._enabled and self._graph is None and self._runs >= _RUNS_BEFORE_CAPTURE:
            self._capture(work)
        if self._graph is None:
            self._runs += 1
            return work()
        self._graph.replay()
        return self._output

    def clear(self) -> None:
        """Free the graph and the tensors that it holds."""
        self._key, self._runs, self._graph = None, 0, None
        self._output = torch.empty(0)

    def _capture(self, work: Callable[[], Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = work()
        self._graph = graph
