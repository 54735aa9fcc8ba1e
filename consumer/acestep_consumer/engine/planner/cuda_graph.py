# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs for a pass that comes again and again: what the host needs to launch it falls away.

A decoding step of a small model keeps a GPU busy for less time than the host takes to launch its thousand kernels.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_SEEN_BEFORE = 2
"""How often a pass has to have run before it is recorded: recording costs about as much as a run."""


class CudaGraph:
    """Runs a pass, and from the third time in a row on replays its recording; on CPUs it just runs it."""

    def __init__(self, device: torch.device) -> None:
        self._records = device.type == "cuda"
        self._key: Hashable = None
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Return what ``work`` returns; a replay overwrites the tensor returned before.

        ``key`` stands for everything that a recording fixes: shapes, and the tensors that ``work`` reads and writes.
        """
        if key != self._key:
            self.forget()
            self._key = key
        if self._records and self._graph is None and self._runs >= _SEEN_BEFORE:
            self._record(work)
        if self._graph is None:
            self._runs += 1
            return work()
        self._graph.replay()
        return self._output

    def forget(self) -> None:
        """Let go of the recording and of the tensors that it holds."""
        self._key, self._runs, self._graph = None, 0, None
        self._output = torch.empty(0)

    def _record(self, work: Callable[[], Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = work()
        self._graph = graph
