# SPDX-License-Identifier: Apache-2.0
"""Limits of a worker's stages: each takes the jobs that keep it busy, and no more.

A job keeps its place in a stage until the next one has room. So a plan leaves the language model when the renderer has
room for it, a song leaves the renderer when an encoder is free, and what cannot go on holds up the stages before it,
not the other way round. Places are taken from front to back, and a job alone in a stage never waits: nothing can block
for ever. The waiting ones go by rank.

What is in a stage is counted in its own unit: songs in the language model, seconds of audio in the renderer, jobs in
the others. Encoders are given out in the renderer's process, and only counted here.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Self

from acestep_consumer.concurrency.priority import insert
from acestep_consumer.domain.job import Job, Plan
from acestep_consumer.domain.ports import Report
from acestep_consumer.domain.stages import STAGES, EngineCapacity
from acestep_consumer.policy.memory_budget import PACKS
from acestep_consumer.policy.tiers import DEFAULT_DURATION_S

UPLOADS: Final = 16
"""Jobs whose songs are uploaded at once."""

_LEAST: Final = 2
"""Jobs that a stage takes whatever they weigh: while one is finished, the next one is there."""

_ANY: Final = 1024
"""Room of a stage without a limit."""

_RECENT: Final = 1 / 16
"""Share of the latest job in the mean weight."""


class StageGate:
    """Lets jobs into a stage as long as their weights fit, in the order of their ranks.

    Args:
        limit: returns the most weight inside; None: any.
        least: jobs that may be inside whatever they weigh.
    """

    def __init__(self, limit: Callable[[], float | None] = lambda: None, *, least: int = _LEAST) -> None:
        self._limit = limit
        self._least = least
        self._queue: deque[tuple[float, float, asyncio.Future[None]]] = deque()
        self._weight = 0.0
        self._mean = 0.0
        self.jobs = 0
        """Jobs that have a place."""

    @property
    def waiting(self) -> int:
        """Jobs that wait for a place."""
        return len(self._queue)

    @property
    def limit(self) -> int | None:
        """About how many jobs have places at most, for jobs as the latest ones; None: any number."""
        limit = self._limit()
        if limit is None or not self._mean:
            return None
        return max(self._least, self.jobs + math.floor((limit - self._weight) / self._mean))

    @property
    def weight(self) -> float:
        """Weight of the jobs inside."""
        return self._weight

    async def enter(self, weight: float, rank: float) -> None:
        """Wait for a place."""
        self._mean += (weight - self._mean) * (_RECENT if self._mean else 1.0)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        insert(self._queue, (rank, weight, place), lambda each: each[0])
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._admit()
            else:
                self.leave(weight)
            raise

    def enter_now(self, weight: float) -> None:
        """Take a place, whether there is one or not."""
        self.jobs += 1
        self._weight += weight

    def leave(self, weight: float) -> None:
        """Give a place up."""
        self.jobs -= 1
        self._weight = self._weight - weight if self.jobs else 0.0
        self._admit()

    def _admit(self) -> None:
        while self._queue:
            _, weight, place = self._queue[0]
            if not place.cancelled():
                limit = self._limit()
                if limit is not None and self.jobs >= self._least and self._weight + weight > limit:
                    return
                self.enter_now(weight)
                place.set_result(None)
            self._queue.popleft()


class StageLimits:
    """The stages of one worker.

    Args:
        capacity: returns what the engines can take now.
    """

    def __init__(self, capacity: Callable[[], EngineCapacity] = EngineCapacity) -> None:
        self._capacity = capacity
        self._for_encoder = 0
        self._gates: dict[str, StageGate] = {
            "plan": StageGate(lambda: self._capacity().lm_songs, least=1),
            "render": StageGate(self._render_limit),
            "encode": StageGate(lambda: self._capacity().encoders),
            "upload": StageGate(lambda: UPLOADS),
        }

    def job(self, job: Job) -> "JobPlaces":
        """Return the places of a job, to be entered as a context."""
        return JobPlaces(self, job)

    @property
    def limits(self) -> Mapping[str, int | None]:
        """About how many jobs each stage takes; None: any number."""
        limits = {stage: gate.limit for stage, gate in self._gates.items()}
        return {**dict.fromkeys(STAGES), **limits, "encode": self._capacity().encoders, "upload": UPLOADS}

    @property
    def waiting(self) -> Mapping[str, int]:
        """Jobs that wait for a place, by the stage that they wait for; also inside the language model, for memory."""
        waiting = {stage: gate.waiting for stage, gate in self._gates.items()}
        waiting["plan"] += self._capacity().lm_waiting
        return {**dict.fromkeys(STAGES, 0), **waiting, "encode": self._for_encoder}

    @property
    def wanted(self) -> int | None:
        """Number of further jobs (below zero: fewer) that would be worked on; None while the engines do not tell.

        What waits for a stage is too much, but for one job, which is there when a place becomes free.
        """
        if self._capacity().pack_s is None:
            return None
        if (waiting := sum(self.waiting.values())) > 0:
            return 1 - waiting
        first = self._gates["plan" if self._gates["plan"].jobs else "render"]
        return (first.limit or _ANY) - first.jobs + 1

    def gate(self, stage: str) -> StageGate:
        """Return the gate of a stage that has one."""
        return self._gates[stage]

    def wait_for_encoder(self, *, begins: bool) -> None:
        """Note that a job begins to wait for an encoder, or has one."""
        self._for_encoder += 1 if begins else -1

    def _render_limit(self) -> float | None:
        pack_s = self._capacity().pack_s
        return None if pack_s is None else PACKS * pack_s


class JobPlaces:
    """The places of one job: at most one at a time, from stage to stage. A context manager, which gives up the last."""

    def __init__(self, stages: StageLimits, job: Job) -> None:
        self._stages = stages
        self._job = job
        self._held: tuple[StageGate, float] | None = None
        self._seconds = 0.0
        self._for_encoder = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._move(None)

    async def plan(self) -> None:
        """Wait for a place in the language model, if the job needs it."""
        if self._job.lm is not None:
            await self._take("plan", len(self._job.seeds))

    async def render(self, plan: Plan) -> None:
        """Wait for a place in the renderer; the one in the language model is kept until then."""
        seconds = plan.metas.duration or self._job.request.audio_duration or DEFAULT_DURATION_S
        self._seconds = len(self._job.seeds) * seconds
        await self._take("render", self._seconds)

    async def upload(self) -> None:
        """Wait for a place among the uploads."""
        await self._take("upload", 1)

    def rendering(self, report: Report) -> Report:
        """Return ``report`` for the renderer, which tells when the last song waits for an encoder and has one."""
        encode = self._stages.gate("encode")

        def observed(fraction: float, stage: str) -> None:
            if stage == "render":
                if self._held is not None and self._held[0] is encode:
                    # Its process has died, and the next one renders the songs again.
                    self._enter_now("render", self._seconds)
                self._wait_for_encoder(fraction >= 1)
            elif stage == "encode" and self._for_encoder:
                self._enter_now("encode", 1)
            report(fraction, stage)

        return observed

    def _wait_for_encoder(self, waits: bool) -> None:  # noqa: FBT001 - what is to be noted
        if waits != self._for_encoder:
            self._for_encoder = waits
            self._stages.wait_for_encoder(begins=waits)

    def _enter_now(self, stage: str, weight: float) -> None:
        gate = self._stages.gate(stage)
        gate.enter_now(weight)
        self._move((gate, weight))

    async def _take(self, stage: str, weight: float) -> None:
        gate = self._stages.gate(stage)
        await gate.enter(weight, self._job.rank)
        self._move((gate, weight))

    def _move(self, place: tuple[StageGate, float] | None) -> None:
        """Give up the place that is held, and hold this one."""
        self._wait_for_encoder(False)  # noqa: FBT003 - as above
        held, self._held = self._held, place
        if held is not None:
            gate, weight = held
            gate.leave(weight)
