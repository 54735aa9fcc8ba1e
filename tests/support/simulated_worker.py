# SPDX-License-Identifier: Apache-2.0
"""A worker whose engines are arithmetic, in simulated time: real stage limits and prefetch policy, all else counted.

The language model and the renderer are those of a GPU: a step costs something by itself and something for each song
in it, so that both are faster with more songs, up to a full batch.
"""

import asyncio
import random
import selectors
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from acestep_consumer.domain.job import Plan
from acestep_consumer.domain.stages import EngineCapacity
from acestep_consumer.execution.stage_limits import JobPlaces, StageLimits
from acestep_consumer.worker.prefetch_policy import PrefetchPolicy, WorkerSample
from acestep_schemas.events import LmChoice, Metas
from tests.support.admission import admitted_job

T = TypeVar("T")

READING_S = 2.0
_CHUNKS = 60
_STEPS = 8


class _Clock(selectors.SelectSelector):
    """Never waits, and watches no file: simulated time jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1_000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now_s += timeout or 0.0
        return []


class _SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


def simulate(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in simulated time."""
    with asyncio.Runner(loop_factory=_SimulatedLoop) as runner:
        return runner.run(work)


@dataclass(frozen=True)
class Stations:
    """Seconds of work. A step of either engine takes its ``_s`` and, for each song in it, its ``_song_s``.

    ``lm_s`` and ``lm_song_s`` are of a 60th of a song's steps, ``step_s`` and ``step_song_s`` of one of 8.
    """

    lm_s: float
    lm_song_s: float
    lm_songs: int = 64
    step_s: float = 0.06
    step_song_s: float = 0.01
    pack: int = 6
    encode_s: float = 0.5
    encoders: int = 16
    upload_s: float = 0.3


@dataclass
class Busy:
    """Seconds in which a station had work, and what it finished. ``asked`` is set when a song comes."""

    seconds: float = 0.0
    songs: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Measured:
    """What was seen between two moments."""

    lm: float
    renderer: float
    rate: float
    prefetch: list[int]
    waiting: list[int]


@dataclass
class SimulatedWorker:
    """Takes jobs from a queue that is never empty, as many as ``policy`` says; None: always ``prefetch``."""

    stations: Stations
    policy: PrefetchPolicy | None = None
    prefetch: int = 2
    limited: bool = True
    seed: int = 1
    in_hand: int = 0
    finished: int = 0
    lm: Busy = field(default_factory=Busy)
    renderer: Busy = field(default_factory=Busy)
    numbers: list[int] = field(default_factory=list)
    waited: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311 - lengths of songs
        stations = self.stations
        told = EngineCapacity(lm_songs=stations.lm_songs, pack_s=stations.pack * 100.0, encoders=stations.encoders)
        self.stages = StageLimits(lambda: told if self.limited else EngineCapacity())
        self._job = replace(admitted_job(audio_duration=100), lm=LmChoice(model="lm", backend="vllm"))
        self._plan = Plan(metas=Metas(duration=100))
        self._writing: list[tuple[list[float], asyncio.Event]] = []
        self._rendering: list[tuple[list[int], asyncio.Event]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, warm_up_s: float, seconds: float) -> Measured:
        """Run for both times; return what was seen in the second."""
        self._encoders = asyncio.Semaphore(self.stations.encoders)
        loop = asyncio.get_running_loop()
        engines = [asyncio.create_task(self._lm()), asyncio.create_task(self._renderer())]
        begin = loop.time() + warm_up_s
        before, at = (0.0, 0.0, 0), 0
        while loop.time() < begin + seconds:
            if loop.time() < begin:
                before, at = (self.lm.seconds, self.renderer.seconds, self.finished), len(self.numbers)
            self._fill()
            await asyncio.sleep(READING_S)
            self._read(loop.time())
        for task in (*engines, *self._tasks):
            task.cancel()
        await asyncio.gather(*engines, *self._tasks, return_exceptions=True)
        spent = loop.time() - begin + READING_S
        return Measured(
            lm=(self.lm.seconds - before[0]) / spent,
            renderer=(self.renderer.seconds - before[1]) / spent,
            rate=(self.finished - before[2]) / spent,
            prefetch=self.numbers[at:],
            waiting=self.waited[at:],
        )

    def _read(self, now_s: float) -> None:
        if self.policy is not None:
            sample = WorkerSample(
                now_s=now_s,
                finished=self.finished,
                work=float(self.finished),
                in_hand=self.in_hand,
                wanted=self.stages.wanted,
            )
            self.prefetch = self.policy.read(sample)
        self.numbers.append(self.prefetch)
        self.waited.append(sum(self.stages.waiting.values()))

    def _fill(self) -> None:
        while self.in_hand < self.prefetch:
            self.in_hand += 1
            task = asyncio.create_task(self._one())
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()
            self.in_hand -= 1
            self.finished += 1
            self._fill()

    async def _one(self) -> None:
        with self.stages.job(self._job) as places:
            await places.plan()
            length = max(0.3, self._random.gauss(1.0, 0.2))
            await self._through(self.lm, self._writing, [_CHUNKS * length])
            await places.render(self._plan)
            await self._through(self.renderer, self._rendering, [_STEPS])
            await self._encode(places)
            await places.upload()
            await asyncio.sleep(self.stations.upload_s)

    async def _through(self, busy: Busy, line: list[tuple[list[Any], asyncio.Event]], left: list[Any]) -> None:
        done = asyncio.Event()
        line.append((left, done))
        busy.asked.set()
        await done.wait()

    async def _encode(self, places: JobPlaces) -> None:
        report = places.rendering(lambda *_: None)
        report(1.0, "render")
        async with self._encoders:
            report(0.0, "encode")
            await asyncio.sleep(self.stations.encode_s * self._random.uniform(0.6, 1.4))

    async def _lm(self) -> None:
        stations = self.stations
        while True:
            batch = self._writing[: stations.lm_songs]
            await self._step(self.lm, self._writing, batch, stations.lm_s + len(batch) * stations.lm_song_s)

    async def _renderer(self) -> None:
        stations = self.stations
        while True:
            batch = self._rendering[: stations.pack]
            await self._step(self.renderer, self._rendering, batch, stations.step_s + len(batch) * stations.step_song_s)

    async def _step(self, busy: Busy, line: list[Any], batch: list[Any], seconds: float) -> None:
        if not batch:
            busy.asked.clear()
            await busy.asked.wait()
            return
        await asyncio.sleep(seconds)
        busy.seconds += seconds
        for each in batch:
            left, done = each
            left[0] -= 1
            if left[0] <= 0:
                line.remove(each)
                busy.songs += 1
                done.set()
