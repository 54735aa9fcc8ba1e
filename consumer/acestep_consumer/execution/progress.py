# SPDX-License-Identifier: Apache-2.0
"""Tells subscribers how one job goes: ``started`` once, ``progress`` at most twice a second, never after the end."""

import asyncio
from contextlib import suppress
from typing import Self

import structlog

from acestep_consumer.domain.errors import Unpublished
from acestep_consumer.domain.job import Job
from acestep_consumer.domain.outcome import RunInfo
from acestep_consumer.domain.ports import Events, Reply
from acestep_consumer.execution.eta import Estimate
from acestep_schemas.events import JobEvent, JobProgress, JobStarted, Progress, Started

INTERVAL_S = 0.5

log = structlog.get_logger()


class ProgressReporter:
    """Publishes beside the work and never holds it up: what cannot be published is dropped.

    Leaving the context waits for the publish in flight, so that nothing can overtake the terminal event.
    """

    def __init__(self, events: Events, job: Job, scene: RunInfo, reply: Reply, estimate: Estimate) -> None:
        self._events = events
        self._job = job
        self._scene = scene
        self._reply = reply
        self._estimate = estimate
        self._spans = _spans(with_lm=job.lm is not None)
        self._trace = {"traceparent": job.traceparent}
        self._latest = (0.0, "")
        self._news = asyncio.Event()
        self._over = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._narrate(), name=f"narrate {self._job.task_id}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        self._news.set()
        await asyncio.shield(self._task)

    def report(self, fraction: float, stage: str) -> None:
        """Say how far ``stage`` is, 0 to 1. Falling values are ignored."""
        low, high = self._spans.get(stage, (0.0, 1.0))
        overall = low + (high - low) * min(max(fraction, 0.0), 1.0)
        if overall > self._latest[0]:
            self._latest = (overall, stage)
            self._news.set()

    async def _narrate(self) -> None:
        await self._tell(JobStarted.of(self._started()))
        sequence = 0
        while await self._more():
            sequence += 1
            await self._tell(self._progress(sequence))

    async def _more(self) -> bool:
        """Keep silent for a while, then wait for news; False when the job is over.

        ``started`` is news enough at first: a job that is done within the interval has no progress to tell.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(INTERVAL_S):
                await self._over.wait()
        await self._news.wait()
        self._news.clear()
        return not self._over.is_set()

    async def _tell(self, event: JobEvent) -> None:
        try:
            await self._events.publish(event.model_copy(update=self._trace), self._reply)
        except Unpublished as error:
            log.warning("event dropped", type=event.type, task_id=self._job.task_id, reason=str(error))

    def _started(self) -> Started:
        job, scene = self._job, self._scene
        return Started(
            task_id=job.task_id,
            attempt=scene.attempt,
            worker_id=scene.worker_id,
            model=job.model,
            lm=job.lm,
            policy=job.policy,
            expected_s=_rounded(self._estimate.expected_s),
        )

    def _progress(self, sequence: int) -> JobProgress:
        fraction, stage = self._latest
        data = Progress(
            task_id=self._job.task_id,
            progress=round(fraction, 3),
            stage=stage,
            sequence=sequence,
            remaining_s=_rounded(self._estimate.remaining_s(fraction)),
        )
        return JobProgress.of(data, attempt=self._scene.attempt, worker_id=self._scene.worker_id)


def _spans(*, with_lm: bool) -> dict[str, tuple[float, float]]:
    """Each stage's share of the whole: thinking takes about as long as rendering."""
    plan = 0.5 if with_lm else 0.0
    return {"plan": (0.0, plan), "render": (plan, 0.9), "encode": (0.9, 0.95), "upload": (0.95, 1.0)}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
