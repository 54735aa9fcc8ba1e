# SPDX-License-Identifier: Apache-2.0
"""Admission to the device: jobs wait in the order of their ranks until memory and LoRA weights let them in."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from acestep_consumer.concurrency.priority import insert
from acestep_consumer.engine.renderer.batch_request import BatchRequest
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.policy.memory_budget import MemoryBudget


@dataclass(frozen=True, slots=True)
class DeviceCapacity:
    """Load and limit of the device; ``lora_bytes`` are those that adapted DiTs take beside their bases."""

    active: Sequence[BatchRequest]
    budget: MemoryBudget
    lora_bytes: int = 0

    def fits(self, request: BatchRequest, chosen: Sequence[BatchRequest]) -> bool:
        """Whether memory allows a request beside the active and the chosen ones. A request alone is always tried."""
        present = [*self.active, *chosen]
        held = self.lora_bytes + sum(each.bytes for each in present)
        return not present or self.budget.has_room(held, request.bytes)

    def allows(self, request: BatchRequest, chosen: Sequence[BatchRequest]) -> bool:
        """Whether nothing but memory can keep a request out."""
        present = [*self.active, *chosen]
        if present and (request.exclusive or present[0].exclusive):
            return False
        # Offloaded modules are swapped at every stage: there a batch goes all the way before the next one begins.
        return not (self.active and request.runner.parts.swapper is not None)


class WaitingQueue:
    """A queue of requests by rank. ``memory_waits`` counts those that had to wait for memory."""

    def __init__(self) -> None:
        self.requests: deque[BatchRequest] = deque()
        self.memory_waits = 0

    def add(self, request: BatchRequest) -> None:
        """Add a request by its rank, but behind one that is to be restarted alone."""
        insert(self.requests, request, lambda each: -inf if each.exclusive else each.rank)

    def next_batch(self, capacity: DeviceCapacity, max_requests: int) -> list[BatchRequest]:
        """Return the first requests that can be prepared together and fit. They stay in the queue."""
        chosen: list[BatchRequest] = []
        for request in self._without_lora_conflict(capacity.active):
            if len(chosen) == max_requests or (chosen and request.batch_key != chosen[0].batch_key):
                break
            if not capacity.allows(request, chosen):
                break
            if not capacity.fits(request, chosen):
                self._note_wait(request)
                break
            chosen.append(request)
        return chosen

    def remove(self, request: BatchRequest) -> None:
        """Remove a request, if it is in the queue."""
        if request in self.requests:
            self.requests.remove(request)

    def _note_wait(self, request: BatchRequest) -> None:
        self.memory_waits += not request.waited
        request.waited = True

    def _without_lora_conflict(self, active: Sequence[BatchRequest]) -> Iterator[BatchRequest]:
        """Yield requests whose LoRA can be used now: a model has one at a time, since each is a copy of its weights.

        Requests without a LoRA pass; those with another one wait behind the first that waits.
        """
        in_use = {request.runner: request.lora for request in active if request.lora}
        blocked: set[ModelRunner] = set()
        for request in self.requests:
            runner, lora = request.runner, request.lora
            if lora and (runner in blocked or in_use.setdefault(runner, lora) != lora):
                blocked.add(runner)
            else:
                yield request
