# SPDX-License-Identifier: Apache-2.0
"""Offloading of the language model: it is kept in RAM while idle, so that the renderer has the device to itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from acestep_consumer.engine.planner.backend import Backend, Generation, SequenceOutput


class OffloadedBackend:
    """Implements ``Backend``: loads the model on ``device`` for the first sequence, and offloads it after the last.

    ``open_backend`` makes the actual backend once the model is loaded; it is dropped with all that it holds on the
    device. A move takes a few tenths of a second, the transfer of the weights.
    """

    def __init__(self, model: Any, device: torch.device, open_backend: Callable[[], Backend]) -> None:
        self._model = model
        self._device = device
        self._open_backend = open_backend
        self._backend: Backend | None = None
        self._model.to("cpu")

    @property
    def idle(self) -> bool:
        """Whether there is nothing to generate."""
        return self._backend is None

    def add(self, sequence_id: int, generation: Generation) -> None:
        """Add a sequence, and load the model if it is offloaded."""
        if self._backend is None:
            self._model.to(self._device)
            self._backend = self._open_backend()
        self._backend.add(sequence_id, generation)

    def drop(self, sequence_id: int) -> None:
        """Drop a sequence; unknown ids are ignored."""
        if self._backend is not None:
            self._backend.drop(sequence_id)
            self._offload_if_idle()

    def step(self) -> Sequence[SequenceOutput]:
        """Generate the next token of every sequence. Returns the progress of those that moved."""
        if self._backend is None:
            return ()
        outputs = self._backend.step()
        self._offload_if_idle()
        return outputs

    def _offload_if_idle(self) -> None:
        if self._backend is not None and self._backend.idle:
            self._backend = None
            self._model.to("cpu")
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
