# SPDX-License-Identifier: Apache-2.0
"""The loop of ``ACESTEP_QUEUE_WORKERS=auto``: what it reads, what it sets, and what it survives."""

import asyncio
from dataclasses import dataclass, field

import pytest

from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.worker import prefetch_controller as pacer_module
from acestep_consumer.worker.prefetch_controller import JOB_S, PrefetchController
from acestep_consumer.worker.prefetch_policy import PrefetchPolicy, WorkerSample
from tests.support.engine_stats import engine_stats
from tests.support.waiting import eventually


@dataclass
class FakeConsumer:
    in_hand: int = 2
    finished: int = 5
    prefetch: int = 2
    broken: bool = False
    was_set: list[int] = field(default_factory=list)

    async def set_prefetch(self, count: int) -> None:
        if self.broken:
            raise ZeroDivisionError
        self.prefetch = count
        self.was_set.append(count)


class Script(PrefetchPolicy):
    """A policy that answers as it is told, and keeps what it reads."""

    def __init__(self, *answers: int) -> None:
        super().__init__(2, 64)
        self._answers = list(answers)
        self.heard: list[WorkerSample] = []

    def read(self, reading: WorkerSample) -> int:
        self.heard.append(reading)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def pacer(
    hands: FakeConsumer, policy: PrefetchPolicy, usage: DeviceUsage | None = None
) -> tuple[PrefetchController, list[int]]:
    told: list[int] = []

    async def tell() -> None:
        told.append(hands.prefetch)

    return PrefetchController(hands, usage or DeviceUsage(), policy, tell), told


async def test_a_change_is_set_and_then_told_and_the_same_number_is_neither() -> None:
    hands = FakeConsumer()
    pace, told = pacer(hands, Script(2, 3, 3, 2))
    for _ in range(4):
        await pace.step()
    assert (hands.was_set, told) == ([3, 2], [3, 2])


async def test_it_reads_the_worker_and_its_engine() -> None:
    usage, script = DeviceUsage(), Script(2)
    usage.note(engine_stats(audio_s=90, memory_gb=30, memory_limit_gb=40, reductions=7), 1.0)
    pace, _ = pacer(FakeConsumer(), script, usage)
    await pace.step()
    (read,) = script.heard
    assert (read.finished, read.in_hand, read.memory, read.reductions) == (5, 2, 0.75, 7)
    assert read.work == 90 + 5 * JOB_S


async def test_an_engine_that_tells_nothing_is_measured_by_its_jobs() -> None:
    script = Script(2)
    pace, _ = pacer(FakeConsumer(), script)
    await pace.step()
    assert (script.heard[0].work, script.heard[0].memory) == (5 * JOB_S, None)


async def test_a_step_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacer_module, "INTERVAL_S", 0.001)
    hands = FakeConsumer(broken=True)
    script = Script(3)
    pace, told = pacer(hands, script)
    running = asyncio.create_task(pace.run())
    await eventually(lambda: len(script.heard) > 2)
    assert told == []
    hands.broken = False
    await eventually(lambda: hands.was_set == [3])
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
