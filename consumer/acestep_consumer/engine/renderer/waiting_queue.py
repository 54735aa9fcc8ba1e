# SPDX-License-Identifier: Apache-2.0
"""Jobs that wait for the device, in order of arrival, and which of them go next."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from acestep_consumer.engine.renderer.batch_request import BatchRequest
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.policy.memory_budget import MemoryBudget


@dataclass(frozen=True, slots=True)
class DeviceCapacity:
    """What is on the device and what fits: jobs at work, the budget, and the bytes of weights that LoRAs changed."""

    active: Sequence[BatchRequest]
    budget: MemoryBudget
    lora_bytes: int = 0

    def fits(self, take: BatchRequest, chosen: Sequence[BatchRequest]) -> bool:
        """Whether a job can begin beside those at work and those just chosen. A job alone is tried in any case."""
        present = [*self.active, *chosen]
        held = self.lora_bytes + sum(each.bytes for each in present)
        return not present or self.budget.has_room(held, take.bytes)

    def is_free_for(self, take: BatchRequest, chosen: Sequence[BatchRequest]) -> bool:
        """Whether nothing but memory can be in a job's way."""
        present = [*self.active, *chosen]
        if present and (take.alone or present[0].alone):
            return False
        # Parts that wait in RAM change places at each stage: then a pack goes all its way before the next begins.
        return not (self.active and take.booth.parts.card is not None)


class WaitingQueue:
    """The waiting line. ``waits`` counts the jobs that had to wait for memory."""

    def __init__(self) -> None:
        self.takes: deque[BatchRequest] = deque()
        self.waits = 0

    def next_batch(self, room: DeviceCapacity, most: int) -> list[BatchRequest]:
        """Return the first jobs that can be prepared together and fit, at most ``most``. They stay in the line."""
        chosen: list[BatchRequest] = []
        for take in self._after_other_loras(room.active):
            if len(chosen) == most or (chosen and take.kind != chosen[0].kind):
                break
            if not room.is_free_for(take, chosen):
                break
            if not room.fits(take, chosen):
                self._note_wait(take)
                break
            chosen.append(take)
        return chosen

    def leave(self, take: BatchRequest) -> None:
        """Take a job out, if it is there."""
        if take in self.takes:
            self.takes.remove(take)

    def _note_wait(self, take: BatchRequest) -> None:
        self.waits += not take.waited
        take.waited = True

    def _after_other_loras(self, active: Sequence[BatchRequest]) -> Iterator[BatchRequest]:
        """Yield waiting jobs whose LoRA can be used now: a model has one at a time, since each is a model of its own.

        Jobs without one pass; jobs with another wait behind the one that waits.
        """
        in_use = {take.booth: take.lora for take in active if take.lora}
        closed: set[ModelRunner] = set()
        for take in self.takes:
            if take.lora and (take.booth in closed or in_use.setdefault(take.booth, take.lora) != take.lora):
                closed.add(take.booth)
            else:
                yield take
