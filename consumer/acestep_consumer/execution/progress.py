# SPDX-License-Identifier: Apache-2.0
"""Publishes a job's ``started`` event and its ``progress`` events, at most two a second and none after its end."""

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
from acestep_schemas.request import GenerationRequest

INTERVAL_S = 0.5
MAX_REQUEST_BYTES = 128 << 10

log = structlog.get_logger()


class ProgressReporter:
    """Publishes in a task of its own, so that the job never waits; an event that cannot be published is dropped.

    Leaving the context does not wait for the publish in flight, so that an unreachable broker cannot hold back the
    manifest. ``finished`` does: call it before the terminal event, which no other event may follow.
    """

    def __init__(self, events: Events, job: Job, info: RunInfo, reply: Reply, estimate: Estimate) -> None:
        self._events = events
        self._job = job
        self._info = info
        self._reply = reply
        self._estimate = estimate
        self._spans = _spans(with_lm=job.lm is not None)
        self._trace = {"traceparent": job.traceparent}
        self._latest = (0.0, "")
        self._changed = asyncio.Event()
        self._over = asyncio.Event()

    def __enter__(self) -> Self:
        self._task = asyncio.create_task(self._publish_all(), name=f"progress {self._job.task_id}")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._changed.set()

    async def finished(self) -> None:
        """Wait for the publish in flight."""
        await asyncio.shield(self._task)

    def report(self, fraction: float, stage: str) -> None:
        """Report the progress of ``stage``, 0 to 1. Falling values are ignored."""
        low, high = self._spans.get(stage, (0.0, 1.0))
        overall = low + (high - low) * min(max(fraction, 0.0), 1.0)
        if overall > self._latest[0]:
            self._latest = (overall, stage)
            self._estimate.progress = overall
            self._changed.set()

    async def _publish_all(self) -> None:
        await self._publish(JobStarted.of(self._started()))
        sequence = 0
        while await self._more():
            sequence += 1
            await self._publish(self._progress(sequence))

    async def _more(self) -> bool:
        """Wait for the interval and then for progress; False when the job is over.

        The first interval follows ``started``: a job that ends within it publishes no progress.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(INTERVAL_S):
                await self._over.wait()
        await self._changed.wait()
        self._changed.clear()
        return not self._over.is_set()

    async def _publish(self, event: JobEvent) -> None:
        try:
            await self._events.publish(event.model_copy(update=self._trace), self._reply)
        except Unpublished as error:
            log.warning("event dropped", type=event.type, task_id=self._job.task_id, reason=str(error))

    def _started(self) -> Started:
        job, info = self._job, self._info
        return Started(
            task_id=job.task_id,
            attempt=info.attempt,
            worker_id=info.worker_id,
            model=job.model,
            lm=job.lm,
            policy=job.policy,
            expected_s=_rounded(self._estimate.expected_s),
            request=_announced(job.request),
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
        return JobProgress.of(data, attempt=self._info.attempt, worker_id=self._info.worker_id)


def _spans(*, with_lm: bool) -> dict[str, tuple[float, float]]:
    """Each stage's share of the whole: thinking takes about as long as rendering."""
    plan = 0.5 if with_lm else 0.0
    return {"plan": (0.0, plan), "render": (plan, 0.9), "encode": (0.9, 0.95), "upload": (0.95, 1.0)}


def _announced(request: GenerationRequest) -> GenerationRequest | None:
    """Return the request for the ``started`` event; None: it is too large. Audio in it is never published."""
    words = request.model_copy(update={"audio_code_string": ""})
    return words if len(words.model_dump_json().encode()) <= MAX_REQUEST_BYTES else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
