# SPDX-License-Identifier: Apache-2.0
"""A backend whose model waits in RAM while there is nothing to write, so that the renderer has the card to itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from acestep_consumer.engine.planner.backend import Backend, Generation, Written


class OffloadedBackend:
    """Implements ``Backend``: brings the model to ``device`` with the first sequence, takes it away after the last.

    ``open_backend`` makes the backend that writes, on the model where it is then; what it holds on the device goes with
    it. A move costs as long as the weights take over the bus, a few tenths of a second.
    """

    def __init__(self, model: Any, device: torch.device, open_backend: Callable[[], Backend]) -> None:
        self._model = model
        self._device = device
        self._open_backend = open_backend
        self._backend: Backend | None = None
        self._model.to("cpu")

    @property
    def idle(self) -> bool:
        """Whether there is nothing to write."""
        return self._backend is None

    def add(self, number: int, generation: Generation) -> None:
        """Take a sequence in, and the model to the device if it is not there."""
        if self._backend is None:
            self._model.to(self._device)
            self._backend = self._open_backend()
        self._backend.add(number, generation)

    def drop(self, number: int) -> None:
        """Forget a sequence; unknown numbers are ignored."""
        if self._backend is not None:
            self._backend.drop(number)
            self._rest_if_idle()

    def step(self) -> Sequence[Written]:
        """Write the next token of every sequence; return news of those that moved."""
        if self._backend is None:
            return ()
        news = self._backend.step()
        self._rest_if_idle()
        return news

    def _rest_if_idle(self) -> None:
        if self._backend is not None and self._backend.idle:
            self._backend = None
            self._model.to("cpu")
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
